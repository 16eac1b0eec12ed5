"""Runs and studies side by side, read from MLflow: table, curves, and tokens to reach another run's final loss."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.analysis.curves import tokens_to_reach
from hybridnas.config import FrozenConfig, option
from hybridnas.errors import StudyError, suggest
from hybridnas.report.html import cell, difference, markup, render, short
from hybridnas.report.leaderboard import signed
from hybridnas.report.plots import COLORS, Axis, Series, curves_svg, scatter_svg
from hybridnas.study.records import clean_points, save
from hybridnas.tracking import mlflow as tracking
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.tracker import first_line
from hybridnas.units import human, human_bytes

COLUMNS = (
    "study", "trial", "preset", "pattern", "params", "active_params", "state_bytes", "flops_per_token", "final_loss",
    "vs_baseline", "tokens", "baseline", "baseline_loss", "baseline_tokens", "tokens_to_baseline_loss", "speed_up",
    "tokens_per_second", "status", "fingerprint", "run_id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CompareConfig(FrozenConfig):
    """Settings of the command, one for one those of conf/compare.yaml."""

    study: str | None = option(None, "studies to compare, separated by commas; none: all that are found")
    run: str | None = option(None, "trial numbers, presets or patterns to keep, separated by commas; none: all")
    baseline: str | None = option(
        None, "whose final loss the others must reach: a preset, trial or pattern; none: mamba, else the best run"
    )
    runs: str = option("runs", "folder in which studies lie; every mlflow.db below it is read [path]")
    uri: str | None = option(None, "MLflow tracking URI to read instead of the runs folder")
    out: str = option("runs/compare", "folder that gets compare.html and compare.csv [path]")

    @classmethod
    def label(cls) -> str:
        return "compare"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as MLflow has it: a trial of a study, or a training of its own."""

    run_id: str
    study: str
    trial: int | None
    pattern: str
    preset: str | None
    fingerprint: str
    status: str  # finished, killed (pruned), failed or running
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    points: Sequence[tuple[float, float]] = ()  # training tokens, validation loss

    @property
    def name(self) -> str:
        """Return the preset's name, else the pattern, else the study's name."""
        return self.preset or self.pattern or self.study

    @property
    def title(self) -> str:
        """Return the name with study and trial, unique among runs."""
        place = self.study if self.trial is None else f"{self.study}/{self.trial}"
        return f"{self.name} ({place})"

    @property
    def complete(self) -> bool:
        """Whether it trained to its end."""
        return self.status == "finished" and bool(self.points)

    def number(self, name: str) -> float | None:
        """Return a parameter as a number, None where it is absent."""
        try:
            return float(self.params[name])
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True)
class Reach:
    """When a run first reaches the baseline's final loss."""

    baseline: Run
    tokens: float | None  # None: not reached
    at_first_point: bool = False  # it was there at its first evaluation: the true figure is lower

    @property
    def speed_up(self) -> float | None:
        """Return the baseline's tokens over the run's tokens: the paper's speed-up."""
        return self.baseline.points[-1][0] / self.tokens if self.tokens else None

    def words(self) -> str:
        """Return the speed-up as people read it."""
        if self.speed_up is None:
            return "not reached"
        return f"{'at least ' if self.at_first_point else ''}{self.speed_up:.2f}x"


@dataclass(frozen=True)
class Comparison:
    """Runs with what each needed to reach the baseline, best first."""

    runs: list[Run]
    reaches: dict[str, Reach | None]  # by run id; None where no baseline applies
    baseline: str

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the terminal's columns and rows."""
        columns = ["run", "study", "trial", "params", "active", "loss", f"vs {self.baseline}", "tokens"]
        columns += [f"tokens to {self.baseline}'s loss", "speed-up", "status"]
        rows = []
        for run in self.runs:
            reach = self.reaches[run.run_id]
            rows.append([
                run.name, run.study, "" if run.trial is None else str(run.trial), human(run.number("params")),
                human(run.number("active_params")), f"{run.points[-1][1]:.4f}" if run.points else "",
                signed(_gap(run, reach)), human(run.points[-1][0] if run.points else None),
                human(reach.tokens) if reach else "", reach.words() if reach else "", run.status,
            ])  # fmt: skip
        return columns, rows


def compare(config: CompareConfig) -> Comparison:
    """Read the runs and set each against the baseline; raises StudyError where there is nothing, or no such name."""
    found = find_runs(config)
    baseline = config.baseline or _default_baseline(select(found, config.replace(run=None), None))
    runs = select(found, config, baseline)
    return Comparison(sorted(runs, key=_by_loss), _reaches(runs, baseline), baseline)


def find_runs(config: CompareConfig) -> list[Run]:
    """Return every trial and training found at ``uri``, or in each ``mlflow.db`` below the runs folder."""
    if config.uri is not None:
        runs, place = read_runs(config.uri), f"at {masked(config.uri)}"
    else:
        folder = Path(config.runs)
        databases = sorted({*folder.glob("mlflow.db"), *folder.glob("*/mlflow.db")})
        runs = [run for database in databases for run in read_runs(tracking.default_uri(database.parent))]
        place = f"in {folder}/*/mlflow.db"
    if not runs:
        raise StudyError(
            f"no runs {place}; run 'python -m hybridnas.search space=mamba_moe' first, "
            "or say where they are with runs=FOLDER or uri=URI"
        )
    return runs


def read_runs(uri: str) -> list[Run]:
    """Return the trials and trainings that an MLflow server or database knows; raises StudyError when it fails."""
    try:
        client = tracking.connect(uri)
        experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
        if experiment is None:
            return []
        found = tracking.search_runs(client, experiment.experiment_id, "")
        return [_run(client, item) for item in found if _wanted(item.data.tags)]
    except Exception as error:  # whatever the server or its client raises is the same news for the user
        words = masked(first_line(error))
        raise StudyError(f"MLflow at {masked(uri)} cannot be read: {words}") from None


def select(runs: Iterable[Run], config: CompareConfig, baseline: str | None) -> list[Run]:
    """Keep the studies and runs that were asked for, and always the baseline; raises StudyError for unknown names."""
    kept = list(runs)
    studies = {run.study for run in kept}
    for name in _names(config.study):
        if name not in studies:
            raise StudyError(f"no study {name!r} among the runs{suggest(name, studies)}")
    if config.study:
        kept = [run for run in kept if run.study in _names(config.study)]
    wanted = _names(config.run)
    for name in wanted:
        if not any(_is(run, name) for run in kept):
            raise StudyError(f"no run {name!r}{suggest(name, _known(kept))}")
    if wanted:
        kept = [run for run in kept if (baseline and _is(run, baseline)) or any(_is(run, name) for name in wanted)]
    return kept


def write_comparison(comparison: Comparison, out: Path | str) -> tuple[Path, Path]:
    """Write ``compare.html`` and ``compare.csv`` atomically; raises StudyError when the disk refuses."""
    folder = Path(out)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_csv_row(run, comparison.reaches[run.run_id]) for run in comparison.runs)
    save(folder / "compare.csv", text.getvalue())
    save(folder / "compare.html", render_comparison(comparison))
    return folder / "compare.html", folder / "compare.csv"


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as one self-contained HTML page."""
    colors = _colors(comparison)
    final = [run for run in comparison.runs if run.points]
    curves = [_series(run, colors, run.points) for run in final]
    complete = [run for run in final if run.complete]
    panels = []
    for figure, axis in (
        ("active_params", Axis("active parameters", log=True)),
        ("params", Axis("parameters in all, without embeddings", log=True)),
        ("state_bytes", Axis("state of one sequence", log=True, in_bytes=True)),
    ):
        known = [(run, value) for run in complete if (value := run.number(figure)) is not None]
        panels.append((axis, [_series(run, colors, [(value, run.points[-1][1])]) for run, value in known]))
    studies = sorted({run.study for run in comparison.runs})
    return render(
        "compare.html.j2",
        title="hybridnas: comparison",
        kicker=", ".join(studies),
        headline=_headline(comparison),
        baseline=comparison.baseline,
        table=_html_table(comparison, colors),
        curves=markup(curves_svg(curves)),
        costs=markup(scatter_svg(panels, "costs", front=True)),
    )


def _headline(comparison: Comparison) -> str:
    best = comparison.runs[0]
    reach = comparison.reaches[best.run_id]
    if not best.points or reach is None:
        return f"{len(comparison.runs)} runs side by side"
    if reach.baseline.run_id == best.run_id:
        return f"No run ends below {comparison.baseline}"
    if reach.speed_up is None:
        return f"No run reaches {comparison.baseline}'s final loss"
    return f"{best.name} reaches {comparison.baseline}'s final loss {reach.words()} sooner"


def _html_table(comparison: Comparison, colors: Mapping[str, str]) -> dict[str, Any]:
    base = comparison.baseline
    names = ["run", "study", "trial", "params", "active", "state", "loss", f"vs {base}", "tokens"]
    names += [f"tokens to {base}'s loss", "speed-up", "tokens/s", ""]
    columns = [{"name": name, "help": "", "text": name in ("run", "study", "")} for name in names]
    rows = []
    for index, run in enumerate(comparison.runs):
        reach = comparison.reaches[run.run_id]
        gap = _gap(run, reach)
        final = run.points[-1] if run.points else (None, None)
        speed = run.metrics.get("tokens_per_second")
        color = colors.get(run.run_id, "faint")
        first = {"text": run.pattern, "strong": run.preset or "", "sort": run.name, "style": "arch text"}
        cells = [
            {**first, "dot": "" if color == "faint" else color},
            cell(run.study, run.study, "text"),
            cell("" if run.trial is None else str(run.trial), run.trial),
            *(cell(human(run.number(key)), run.number(key)) for key in ("params", "active_params")),
            cell(human_bytes(run.number("state_bytes")), run.number("state_bytes")),
            cell("" if final[1] is None else f"{final[1]:.4f}", final[1]),
            cell(difference(gap), gap, "good" if gap is not None and gap < -5e-5 else ""),
            cell(human(final[0]), final[0]),
            cell(human(reach.tokens) if reach else "", reach.tokens if reach else None),
            cell(reach.words() if reach else "", reach.speed_up if reach else None),
            cell(human(speed), speed),
            cell(run.status, run.status, "text"),
        ]
        style = "dim" if not run.complete else "first" if index == 0 else ""
        rows.append({"trial": run.run_id, "style": style, "cells": cells})
    return {"columns": columns, "rows": rows}


def _colors(comparison: Comparison) -> dict[str, str]:
    """Color and label the best eight complete runs and the baselines; the others stay faint."""
    told = [run for run in comparison.runs if run.complete][:8]
    base = {reach.baseline.run_id: reach.baseline for reach in comparison.reaches.values() if reach}
    ids = dict.fromkeys([*base, *(run.run_id for run in told)])
    wheel = [name for name in COLORS if name[0] == "c" and name[1:].isdigit()]
    return dict(zip(list(ids)[: len(wheel)], wheel, strict=False))


def _series(run: Run, colors: Mapping[str, str], points: Sequence[tuple[float, float]]) -> Series:
    color = colors.get(run.run_id, "faint")
    label = "" if color == "faint" else short(run.name, 16)
    return Series(run.run_id, run.title, color, label, points, hollow=not run.complete)


def _csv_row(run: Run, reach: Reach | None) -> list[Any]:
    last = run.points[-1] if run.points else (None, None)
    values: dict[str, Any] = {
        **{key: run.params.get(key) for key in ("params", "active_params", "state_bytes", "flops_per_token")},
        **{
            key: getattr(run, key) for key in ("study", "trial", "preset", "pattern", "status", "fingerprint", "run_id")
        },
        "final_loss": last[1],
        "tokens": last[0],
        "tokens_per_second": run.metrics.get("tokens_per_second"),
        "vs_baseline": _gap(run, reach),
    }
    if reach is not None:
        values |= {"baseline": reach.baseline.title, "baseline_loss": reach.baseline.points[-1][1],
                   "baseline_tokens": reach.baseline.points[-1][0], "speed_up": reach.speed_up,
                   "tokens_to_baseline_loss": "not reached" if reach.tokens is None else reach.tokens}  # fmt: skip
    return [values.get(column) for column in COLUMNS]


def _default_baseline(runs: Sequence[Run]) -> str:
    """The paper's baseline where it was trained, else the best run: a comparison needs no more than two runs."""
    full = sorted((run for run in runs if run.complete), key=_by_loss)
    if not full or any(_is(run, "mamba") for run in full):
        return "mamba"
    best = full[0]
    return best.preset or (best.study if best.trial is None else f"{best.study}/{best.trial}")


def _reaches(runs: Sequence[Run], baseline: str) -> dict[str, Reach | None]:
    candidates = sorted((run for run in runs if _is(run, baseline) and run.points), key=_by_loss)
    full = [run for run in candidates if run.complete]
    if not full:
        if candidates:
            raise StudyError(f"baseline {baseline!r} did not train to its end in any study; choose another baseline=")
        raise StudyError(f"no run is baseline {baseline!r}{suggest(baseline, _known(runs))}")
    found: dict[str, Reach | None] = {}
    for run in runs:
        # A run answers to the baseline of its own study; only a study without one borrows.
        base = next((other for other in full if other.study == run.study), full[0])
        loss = base.points[-1][1]
        tokens = base.points[-1][0] if run.run_id == base.run_id else tokens_to_reach(run.points, loss)
        first = bool(run.points) and tokens == run.points[0][0] and run.points[0][1] < loss
        found[run.run_id] = Reach(base, tokens, first) if run.points else None
    return found


def _gap(run: Run, reach: Reach | None) -> float | None:
    """Return the difference of final losses; a stopped run has none."""
    return run.points[-1][1] - reach.baseline.points[-1][1] if reach and run.complete else None


def _run(client: Any, item: Any) -> Run:
    tags, run_id = item.data.tags, item.info.run_id
    history = client.get_metric_history(run_id, "valid_loss")
    trial = tags.get("hybridnas.trial")
    return Run(
        run_id=run_id,
        study=tags.get("hybridnas.study", ""),
        trial=int(trial) if trial is not None and trial.isdigit() else None,
        pattern=tags.get("hybridnas.pattern") or item.data.params.get("pattern", ""),
        preset=tags.get("hybridnas.preset") or item.data.params.get("preset"),
        fingerprint=tags.get("hybridnas.fingerprint", ""),
        status=item.info.status.lower(),
        params=dict(item.data.params),
        metrics=dict(item.data.metrics),
        points=clean_points([(metric.step, metric.value) for metric in sorted(history, key=lambda m: m.timestamp)]),
    )


def _wanted(tags: Mapping[str, str]) -> bool:
    repeated = tags.get("hybridnas.state") == "DUPLICATE" or "hybridnas.superseded" in tags
    return tags.get("hybridnas.kind") in ("trial", "train") and not repeated


def _is(run: Run, name: str) -> bool:
    return name in (run.preset, run.pattern, str(run.trial), f"{run.study}/{run.trial}", run.run_id, run.study) and (
        name != run.study or run.trial is None
    )


def _names(text: str | None) -> list[str]:
    """Split at commas that are not inside brackets, so that a pattern like [M,E] stays whole."""
    parts, depth = [""], 0
    for character in text or "":
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _known(runs: Iterable[Run]) -> set[str]:
    return {run.name for run in runs}


def _by_loss(run: Run) -> tuple[bool, float]:
    return (not run.complete, run.points[-1][1] if run.points else float("inf"))
