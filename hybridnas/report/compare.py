"""Runs and studies side by side: table, curves, and the tokens to reach another run's final loss.

Runs are read from the records of the studies and trainings below a folder, or from MLflow where a URI is named.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.analysis.curves import tokens_to_reach
from hybridnas.config import FrozenConfig, option, split_list, unquoted
from hybridnas.errors import StudyError, suggest
from hybridnas.report.html import cell, difference, markup, render, short
from hybridnas.report.leaderboard import signed
from hybridnas.report.plots import COLORS, Axis, Series, curves_svg, scatter_svg
from hybridnas.study.folder import read_study
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    clean_points,
    load_records,
    read_curve,
    reference_of,
    save,
)
from hybridnas.tracking.mlflow import RecordedRun, read_runs
from hybridnas.units import human, human_bytes

log = logging.getLogger("hybridnas.report")

COLUMNS = (
    "study", "trial", "preset", "pattern", "params", "active_params", "state_bytes", "flops_per_token", "final_loss",
    "vs_baseline", "tokens", "baseline", "baseline_loss", "baseline_tokens", "tokens_to_baseline_loss", "speed_up",
    "tokens_per_second", "status", "fingerprint", "run_id",
)  # fmt: skip
STATUS = {COMPLETE: "complete", PRUNED: "pruned", FAIL: "failed", RUNNING: "unfinished"}
_ENDED = {"completed": COMPLETE, "stopped": COMPLETE, "failed": FAIL}  # how a training that stands alone ended
_COSTS = ("params", "active_params", "state_bytes", "flops_per_token")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(FrozenConfig):
    """Settings of the command."""

    study: str | None = option(None, "studies to compare, separated by commas; none: all that are found")
    run: str | None = option(None, "trial numbers, presets or patterns to keep, separated by commas; none: all")
    baseline: str | None = option(
        None, "whose final loss the others must reach: a preset, trial or pattern; none: the reference, else the best"
    )
    runs: Path = option(Path("runs"), "folder in which studies and trainings lie")
    uri: str | None = option(None, "MLflow tracking URI to read instead of the runs folder")
    out: Path = option(Path("runs/compare"), "folder that gets compare.html and compare.csv [path]")

    @classmethod
    def label(cls) -> str:
        return "compare"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trial of a study, a training of a suite, or a training that stands alone."""

    run_id: str  # unique: the folder, or MLflow's id
    study: str
    trial: int | None
    pattern: str
    preset: str | None
    fingerprint: str
    status: str  # complete, pruned, failed or unfinished
    costs: Mapping[str, float] = field(default_factory=dict)  # params, active_params, state_bytes, flops_per_token
    tokens_per_second: float | None = None  # while training
    points: Sequence[tuple[float, float]] = ()  # training tokens, validation loss
    reference: str | None = None  # the preset that its study compares with

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
        return self.status == STATUS[COMPLETE] and bool(self.points)


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

    def text(self) -> str:
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
                run.name, run.study, "" if run.trial is None else str(run.trial), human(run.costs.get("params")),
                human(run.costs.get("active_params")), f"{run.points[-1][1]:.4f}" if run.points else "",
                signed(_gap(run, reach)), human(run.points[-1][0] if run.points else None),
                human(reach.tokens) if reach else "", reach.text() if reach else "", run.status,
            ])  # fmt: skip
        return columns, rows


def compare(config: CompareConfig) -> Comparison:
    """Read the runs and set each against the baseline; raises StudyError where there is nothing, or no such name."""
    found = find_runs(config)
    baseline = config.baseline or _default_baseline(select(found, config.replace(run=None), None))
    runs = select(found, config, baseline)
    return Comparison(sorted(runs, key=_by_loss), _reaches(runs, baseline), baseline)


def find_runs(config: CompareConfig) -> list[Run]:
    """Return every trial and training found at ``uri``, or by the records below the runs folder.

    Raises StudyError where there is none, or where MLflow cannot be read.
    """
    if config.uri is not None:
        recorded, place = read_runs(config.uri)
        runs = [_of_mlflow(run) for run in recorded]
    else:
        folder = Path(config.runs).expanduser()
        runs, place = read_folder(folder), f"in {folder}"
    if not runs:
        raise StudyError(
            f"no runs {place}; run 'python -m hybridnas.search space=mamba_moe' first, "
            "or say where they are with runs=FOLDER or uri=URI",
            field="runs" if config.uri is None else "uri",
            got=config.runs if config.uri is None else place,
        )
    return runs


def read_folder(folder: Path) -> list[Run]:
    """Return the trials of all studies in a folder and the trainings below it, or those of the folder itself."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found: list[Run | None] = []
    for place in (folder, *inside):
        if (place / "study.json").is_file():
            found += _of_study(place)
        elif place != folder:
            found += [_of_training(place, path.parent) for path in sorted(place.rglob("run.json"))]
        elif (place / "run.json").is_file():
            found.append(_of_training(place, place))
    return [run for run in found if run is not None]


def _of_study(folder: Path) -> list[Run]:
    study = read_study(folder)
    reference = reference_of(study)
    return [
        Run(
            run_id=f"{folder.name}/{record.number}",
            study=folder.name,
            trial=record.number,
            pattern=record.pattern,
            preset=record.preset,
            fingerprint=record.fingerprint,
            status=STATUS[record.state],
            costs=_costs(record.cost),
            tokens_per_second=record.tokens_per_second,
            points=record.points(),
            reference=reference,
        )
        for record in load_records(folder)[0]
        if record.state not in (DUPLICATE, INFEASIBLE)
    ]


def _of_training(place: Path, folder: Path) -> Run | None:
    """Return a training that is no study's trial, by its run.json and its measurements; None for a damaged one."""
    from hybridnas.arch.arch import Arch
    from hybridnas.errors import HybridNASError

    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        labels, settings = about.get("labels", {}), about["train"]
        arch = Arch.from_dict(about["architecture"]) if "pattern" in about["architecture"] else None
        costs = _costs(dataclasses.asdict(arch.cost(settings["seq_len"]))) if arch else _costs(about["architecture"])
        inside = folder.relative_to(place).as_posix()
        return Run(
            run_id=f"{place.name}/{inside}" if inside != "." else place.name,
            study=place.name,
            trial=_number(place, inside),
            pattern=str(arch.pattern) if arch else str(about["architecture"].get("module", "")),
            preset=labels.get("preset"),
            fingerprint=about["fingerprint"],
            status=STATUS[_ENDED.get(about["status"], RUNNING) if about["final"] else RUNNING],
            costs=costs,
            tokens_per_second=about.get("tokens_per_second") or None,
            points=clean_points([(entry.get("tokens"), entry.get("valid_loss")) for entry in read_curve(folder)]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HybridNASError) as error:
        log.warning("%s is left out of the comparison: %s", folder, error)
        return None


def _of_mlflow(run: RecordedRun) -> Run:
    costs = {name: run.params[name] for name in _COSTS if name in run.params}
    return Run(
        run_id=run.run_id,
        study=run.study,
        trial=run.trial,
        pattern=run.tags.get("pattern") or run.params.get("pattern", ""),
        preset=run.tags.get("preset") or run.params.get("preset"),
        fingerprint=run.tags.get("fingerprint", ""),
        status=STATUS.get(run.state, run.state.lower()),
        costs=_costs(costs),
        tokens_per_second=run.metrics.get("tokens_per_second"),
        points=clean_points(run.points),
        reference=run.reference,
    )


def _costs(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(values[name]) for name in _COSTS if values.get(name) is not None}


def _number(place: Path, inside: str) -> int | None:
    """Return the number that a suite gave to a training's folder, None where there is none."""
    try:
        return int(json.loads((place / "numbers.json").read_text(encoding="utf-8"))[inside])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def select(runs: Iterable[Run], config: CompareConfig, baseline: str | None) -> list[Run]:
    """Keep the studies and runs that were asked for, and always the baseline; raises StudyError for unknown names."""
    kept = list(runs)
    studies = {run.study for run in kept}
    for name in _names(config.study):
        if name not in studies:
            raise StudyError(
                f"no study {name!r} among the runs{suggest(name, studies)}", field="study", got=name, allowed=studies
            )
    if config.study:
        kept = [run for run in kept if run.study in _names(config.study)]
    wanted = _names(config.run)
    for name in wanted:
        if not any(_is(run, name) for run in kept):
            known = _known(kept)
            raise StudyError(f"no run {name!r}{suggest(name, known)}", field="run", got=name, allowed=known)
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
        known = [(run, value) for run in complete if (value := run.costs.get(figure)) is not None]
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
    return f"{best.name} reaches {comparison.baseline}'s final loss {reach.text()} sooner"


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
        speed = run.tokens_per_second
        color = colors.get(run.run_id, "faint")
        first = {"text": run.pattern, "strong": run.preset or "", "sort": run.name, "style": "arch text"}
        cells = [
            {**first, "dot": "" if color == "faint" else color},
            cell(run.study, run.study, "text"),
            cell("" if run.trial is None else str(run.trial), run.trial),
            *(cell(human(run.costs.get(key)), run.costs.get(key)) for key in ("params", "active_params")),
            cell(human_bytes(run.costs.get("state_bytes")), run.costs.get("state_bytes")),
            cell("" if final[1] is None else f"{final[1]:.4f}", final[1]),
            cell(difference(gap), gap, "good" if gap is not None and gap < -5e-5 else ""),
            cell(human(final[0]), final[0]),
            cell(human(reach.tokens) if reach else "", reach.tokens if reach else None),
            cell(reach.text() if reach else "", reach.speed_up if reach else None),
            cell(human(speed), speed),
            cell(run.status, run.status, "text"),
        ]
        style = "dim" if not run.complete else "first" if index == 0 else ""
        rows.append({"trial": run.run_id, "style": style, "cells": cells})
    return {"columns": columns, "rows": rows}


def _colors(comparison: Comparison) -> dict[str, str]:
    """Return the colors of the best eight complete runs and of the baselines; the others stay faint."""
    best = [run for run in comparison.runs if run.complete][:8]
    base = {reach.baseline.run_id: reach.baseline for reach in comparison.reaches.values() if reach}
    ids = dict.fromkeys([*base, *(run.run_id for run in best)])
    wheel = [name for name in COLORS if name[0] == "c" and name[1:].isdigit()]
    return dict(zip(list(ids)[: len(wheel)], wheel, strict=False))


def _series(run: Run, colors: Mapping[str, str], points: Sequence[tuple[float, float]]) -> Series:
    color = colors.get(run.run_id, "faint")
    label = "" if color == "faint" else short(run.name, 16)
    return Series(run.run_id, run.title, color, label, points, hollow=not run.complete)


def _csv_row(run: Run, reach: Reach | None) -> list[Any]:
    last = run.points[-1] if run.points else (None, None)
    values: dict[str, Any] = {
        **run.costs,
        **{
            key: getattr(run, key) for key in ("study", "trial", "preset", "pattern", "status", "fingerprint", "run_id")
        },
        "final_loss": last[1],
        "tokens": last[0],
        "tokens_per_second": run.tokens_per_second,
        "vs_baseline": _gap(run, reach),
    }
    if reach is not None:
        values |= {"baseline": reach.baseline.title, "baseline_loss": reach.baseline.points[-1][1],
                   "baseline_tokens": reach.baseline.points[-1][0], "speed_up": reach.speed_up,
                   "tokens_to_baseline_loss": "not reached" if reach.tokens is None else reach.tokens}  # fmt: skip
    return [values.get(column) for column in COLUMNS]


def _default_baseline(runs: Sequence[Run]) -> str:
    """Return the reference of the studies where it was trained to its end, else the best run."""
    full = sorted((run for run in runs if run.complete), key=_by_loss)
    if not full:
        raise StudyError(
            f"none of {len(runs)} runs trained to its end, so there is no loss to reach; train one of them to its end"
        )
    for reference in dict.fromkeys(run.reference for run in runs):
        if reference is not None and any(_is(run, reference) for run in full):
            return reference
    best = full[0]
    return best.preset or (best.study if best.trial is None else f"{best.study}/{best.trial}")


def _reaches(runs: Sequence[Run], baseline: str) -> dict[str, Reach | None]:
    candidates = sorted((run for run in runs if _is(run, baseline) and run.points), key=_by_loss)
    full = [run for run in candidates if run.complete]
    if not full:
        if candidates:
            raise StudyError(
                f"baseline {baseline!r} did not train to its end in any study; choose another baseline=",
                field="baseline",
                got=baseline,
                allowed=_known(run for run in runs if run.complete),
            )
        known = _known(runs)
        raise StudyError(
            f"no run is baseline {baseline!r}{suggest(baseline, known)}", field="baseline", got=baseline, allowed=known
        )
    found: dict[str, Reach | None] = {}
    for run in runs:
        # A run is compared with the baseline of its own study; one without it with the best of the others.
        base = next((other for other in full if other.study == run.study), full[0])
        loss = base.points[-1][1]
        tokens = base.points[-1][0] if run.run_id == base.run_id else tokens_to_reach(run.points, loss)
        first = bool(run.points) and tokens == run.points[0][0] and run.points[0][1] < loss
        found[run.run_id] = Reach(base, tokens, first) if run.points else None
    return found


def _gap(run: Run, reach: Reach | None) -> float | None:
    """Return the difference of final losses; a stopped run has none."""
    return run.points[-1][1] - reach.baseline.points[-1][1] if reach and run.complete else None


def _is(run: Run, name: str) -> bool:
    return name in (run.preset, run.pattern, str(run.trial), f"{run.study}/{run.trial}", run.run_id, run.study) and (
        name != run.study or run.trial is None
    )


def _names(text: str | None) -> list[str]:
    return [unquoted(item) for item in split_list(text or "")]


def _known(runs: Iterable[Run]) -> set[str]:
    return {run.name for run in runs}


def _by_loss(run: Run) -> tuple[bool, float]:
    return (not run.complete, run.points[-1][1] if run.points else float("inf"))
