"""Runs and studies side by side: tables, curves, and the tokens to reach another run's final loss.

Runs are ranked within a group alone: the same data, context and training tokens. Each group has its own baseline. Runs
of one architecture with several seeds are pooled, with an interval over the seeds. Runs are read from the records of
the studies and trainings below a folder, or from MLflow where a URI is named.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.analysis.bootstrap import mean_interval
from hybridnas.analysis.curves import tokens_to_reach
from hybridnas.config import FrozenConfig, option, split_list, unquoted
from hybridnas.errors import StudyError, suggest
from hybridnas.report import plots
from hybridnas.report.colors import LIGHT, WHEEL, preset_key
from hybridnas.report.html import cell, difference, render, short
from hybridnas.report.leaderboard import signed
from hybridnas.report.plots import Axis, Series
from hybridnas.study.folder import full_name, read_study
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    WORDS,
    TrialRecord,
    clean_points,
    load_records,
    read_curve,
    reference_of,
    save,
)
from hybridnas.tracking.mlflow import RecordedRun, read_runs
from hybridnas.units import human, human_bytes, several

log = logging.getLogger("hybridnas.report")

COLUMNS = (
    "group", "study", "trial", "preset", "pattern", "params", "active_params", "state_bytes", "flops_per_token",
    "final_loss", "vs_baseline", "tokens", "baseline", "baseline_loss", "baseline_tokens", "tokens_to_baseline_loss",
    "speed_up", "tokens_per_second", "status", "seed", "fingerprint", "run_id",
)  # fmt: skip
STATUS = {**{state: WORDS[state] for state in (COMPLETE, PRUNED, FAIL)}, RUNNING: "unfinished"}
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
    figure: Path | None = option(None, "draw the curves of the first group: writes FILE.svg and FILE.png [path]")

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
    data: str = ""  # fingerprint of its data; empty: unknown
    about: str = ""  # its data in words
    seq_len: int | None = None
    asked: int | None = None  # training tokens of a full run
    seeds: Mapping[str, float] = field(default_factory=dict)  # seed -> final loss, of full runs alone

    @property
    def settings(self) -> tuple[str, int | None, int | None]:
        """Return what must agree for two runs to be ranked; runs of unknown data are ranked within their study."""
        return self.data or f"study {self.study}", self.seq_len, self.asked

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
class Pool:
    """One architecture over the seeds with which it was trained to the end."""

    name: str
    seeds: int
    mean: float  # final validation loss [nats per token]
    half: float | None  # half the 95% interval over seeds


@dataclass(frozen=True)
class Group:
    """Runs of the same data, context and training tokens, the best first."""

    runs: list[Run]
    baseline: str | None  # whose final loss the others must reach; None: no run of the group was trained to its end

    @property
    def title(self) -> str:
        """Return data, context and training tokens in words."""
        first = self.runs[0]
        data = first.about.partition(":")[0] or (f"data {first.data[:8]}" if first.data else first.study)
        parts = [data, f"context {first.seq_len:,}" if first.seq_len else ""]
        return ", ".join(filter(None, [*parts, f"{human(first.asked)} tokens" if first.asked else ""]))

    def pools(self) -> list[Pool]:
        """Return the architectures that have several seeds, the best mean first."""
        found: dict[str, tuple[Run, dict[str, float]]] = {}
        for run in self.runs:
            _, known = found.setdefault(run.fingerprint or run.run_id, (run, {}))
            for seed, loss in run.seeds.items():
                known.setdefault(seed, loss)
        several_ = [(run, list(losses.values())) for run, losses in found.values() if len(losses) > 1]
        pools = [Pool(run.name, len(losses), *mean_interval(losses)) for run, losses in several_]
        return sorted(pools, key=lambda pool: pool.mean)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs with what each run needed to reach its group's baseline."""

    groups: list[Group]
    reaches: dict[str, Reach | None]  # by run id; None where no baseline applies

    @property
    def runs(self) -> list[Run]:
        """All runs, group after group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def baseline(self) -> str | None:
        """The baseline of the first group."""
        return self.groups[0].baseline

    def table(self, group: Group) -> tuple[list[str], list[list[str]]]:
        """Return the terminal's columns and rows of a group."""
        columns = ["run", "study", "trial", "params", "active", "loss", f"vs {group.baseline}", "tokens"]
        columns += [f"tokens to {group.baseline}'s loss", "speed-up", "status"]
        rows = []
        for run in group.runs:
            reach = self.reaches[run.run_id]
            rows.append([
                run.name, run.study, "" if run.trial is None else str(run.trial), human(run.costs.get("params")),
                human(run.costs.get("active_params")), f"{run.points[-1][1]:.4f}" if run.points else "",
                signed(_gap(run, reach)), human(run.points[-1][0] if run.points else None),
                human(reach.tokens) if reach else "", reach.text().replace("not reached", "never") if reach else "",
                run.status,
            ])  # fmt: skip
        return columns, rows


def compare(config: CompareConfig) -> Comparison:
    """Read the runs and set each against the baseline of its group; raises StudyError for no runs, or no such name."""
    found = find_runs(config)
    if config.baseline:
        _check_baseline(select(found, config.replace(run=None), None), config.baseline)
    kept = select(found, config, config.baseline)
    groups: list[Group] = []
    reaches: dict[str, Reach | None] = {}
    for settings in dict.fromkeys(run.settings for run in kept):
        own = sorted((run for run in kept if run.settings == settings), key=_by_loss)
        # A filter leaves runs out, not the baseline.
        every = [run for run in select(found, config.replace(run=None), None) if run.settings == settings]
        baseline = _baseline(every, config.baseline)
        more = [run for run in every if baseline is not None and _is(run, baseline) and run not in own]
        groups.append(Group(sorted([*own, *more], key=_by_loss), baseline))
        reaches |= _reaches(groups[-1])
    if not any(group.baseline for group in groups) and not config.baseline:
        raise StudyError(
            f"none of {len(kept)} runs trained to its end, so there is no loss to reach; train one of them to its end"
        )
    groups.sort(key=lambda group: (group.baseline is None, -len(group.runs), group.title))
    return Comparison(groups, reaches)


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
    meta = study.get("meta") or {}
    about = {"data": str(study.get("data_fingerprint") or ""), "about": str(meta.get("data") or "")}
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
            **about,
            seq_len=meta.get("seq_len"),
            asked=meta.get("tokens"),
            seeds=_seeds(record),
        )
        for record in load_records(folder)[0]
        if record.state not in (DUPLICATE, INFEASIBLE)
    ]


def _seeds(record: TrialRecord) -> dict[str, float]:
    """Return a trial's final losses by seed: those of fresh seeds where it was confirmed, which did not choose it."""
    fresh = {seed: loss for seed, loss in {**record.confirmed, **record.verdict}.items() if loss is not None}
    if fresh or record.state != COMPLETE or record.valid_loss is None:
        return fresh
    return {str(record.seed): record.valid_loss}


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
        points = clean_points([(entry.get("tokens"), entry.get("valid_loss")) for entry in read_curve(folder)])
        ended = about["final"] and about["status"] == "completed"
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
            points=points,
            data=str(about.get("data", {}).get("fingerprint", "")),
            seq_len=settings["seq_len"],
            asked=settings.get("tokens"),
            seeds={str(settings.get("seed", 0)): points[-1][1]} if ended and points else {},
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
        data=run.params.get("data_fingerprint", ""),
        about=run.params.get("data", ""),
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
    asked = {name: full_name(name, studies) for name in _names(config.study)}
    for name, found in asked.items():
        if found is None:
            raise StudyError(
                f"no study {name!r} among the runs{suggest(name, studies)}", field="study", got=name, allowed=studies
            )
    if asked:
        kept = [run for run in kept if run.study in asked.values()]
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
    for group in comparison.groups:
        writer.writerows(_csv_row(group, run, comparison.reaches[run.run_id]) for run in group.runs)
    save(folder / "compare.csv", text.getvalue())
    save(folder / "compare.html", render_comparison(comparison))
    return folder / "compare.html", folder / "compare.csv"


def draw_curves(comparison: Comparison, out: Path) -> list[Path]:
    """Draw the loss curves of the first group as ``out``.svg and ``out``.png; returns the files."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from hybridnas.draw.figure import FAINT, SETTINGS
    from hybridnas.draw.figure import save as save_figure

    group = comparison.groups[0]
    colors, names = _colors(comparison, group), _labels(group)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.2, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        for run in sorted((run for run in group.runs if run.points), key=lambda run: run.run_id in colors):
            color, (xs, ys) = colors.get(run.run_id), zip(*run.points, strict=True)
            label = None if color is None else f"{names[run.run_id]} {ys[-1]:.4f}"
            ax.plot(
                xs, ys, color=FAINT if color is None else LIGHT[color], lw=0.7 if color is None else 1.5, label=label
            )
        late = [loss for run in group.runs for tokens, loss in run.points if tokens >= 0.2 * run.points[-1][0]]
        margin = 0.06 * (max(late) - min(late) or 1)
        ax.set_ylim(min(late) - margin, max(late) + 3 * margin)
        ax.set_title(group.title, loc="left", fontsize=11, weight="bold")
        ax.set_xlabel("training tokens")
        ax.set_ylabel("validation loss [nats/token]")
        ax.xaxis.set_major_formatter(lambda value, _: human(value))
        figure.legend(loc="outside right upper", fontsize=8.5)
        out.parent.mkdir(parents=True, exist_ok=True)
        return save_figure(figure, out)


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as one self-contained HTML page."""
    return render(
        "compare.html.j2",
        title="hybridnas: comparison",
        reload=None,
        kicker=", ".join(sorted({run.study for run in comparison.runs})),
        headline=_headline(comparison),
        groups=[_section(comparison, group) for group in comparison.groups],
    )


def _section(comparison: Comparison, group: Group) -> dict[str, Any]:
    """Return the tables and charts of a group."""
    colors, names = _colors(comparison, group), _labels(group)
    final = [run for run in group.runs if run.points]
    panels = []
    for figure, axis in (
        ("active_params", Axis("active parameters", log=True)),
        ("params", Axis("parameters in all, without embeddings", log=True)),
        ("state_bytes", Axis(f"state of one sequence{_at(group)}", log=True, in_bytes=True)),
    ):
        known = [(run, value) for run in final if run.complete and (value := run.costs.get(figure)) is not None]
        series = [_series(run, colors, names, [(value, run.points[-1][1])]) for run, value in known]
        panels.append((axis, series))
    # Parameters that all were matched to say nothing: a line through them would join noise.
    costs = [chart for axis, lines in panels for chart in plots.scatter([(axis, lines)], front=_spread(lines))]
    return {
        "title": group.title,
        "baseline": group.baseline,
        "table": _html_table(comparison, group, colors),
        "pools": _pool_table(group),
        "curves": plots.curves([_series(run, colors, names, run.points) for run in final]),
        "costs": costs,
    }


def _at(group: Group) -> str:
    length = group.runs[0].seq_len
    return f" at {length:,} tokens" if length else ""


def _spread(lines: Sequence[Series]) -> bool:
    """Whether the figures of a panel differ by more than a tenth."""
    values = [line.points[-1][0] for line in lines]
    return bool(values) and max(values) > 1.1 * min(values)


def _headline(comparison: Comparison) -> str:
    if len(comparison.groups) > 1:
        runs = several(len(comparison.runs), "run")
        return f"{runs} in {len(comparison.groups)} groups of the same data and settings; each is ranked by itself"
    best = comparison.runs[0]
    reach = comparison.reaches[best.run_id]
    if not best.points or reach is None:
        return f"{several(len(comparison.runs), 'run')} side by side"
    if reach.baseline.run_id == best.run_id:
        return f"No run ends below {comparison.baseline}"
    if reach.speed_up is None:
        return f"No run reaches {comparison.baseline}'s final loss"
    return f"{best.name} reaches {comparison.baseline}'s final loss {reach.text()} sooner"


def _html_table(comparison: Comparison, group: Group, colors: Mapping[str, str]) -> dict[str, Any]:
    base, length = group.baseline, group.runs[0].seq_len
    names = ["run", "loss", f"vs {base}", "speed-up", "study", "trial", "tokens", f"tokens to {base}'s loss"]
    names += ["params", "active", f"state at {length:,}" if length else "state", "tokens/s", ""]
    columns = [{"name": name, "help": "", "text": name in ("run", "study", "")} for name in names]
    rows = []
    for index, run in enumerate(group.runs):
        reach = comparison.reaches[run.run_id]
        gap = _gap(run, reach)
        final = run.points[-1] if run.points else (None, None)
        speed = run.tokens_per_second
        color = colors.get(run.run_id, "faint")
        named = {**cell(run.pattern, run.name, "arch text"), "strong": run.preset or ""}
        cells = [
            {**named, "dot": "" if color == "faint" else color},
            cell("" if final[1] is None else f"{final[1]:.4f}", final[1]),
            cell(difference(gap), gap, "good" if gap is not None and gap < -5e-5 else ""),
            cell(reach.text() if reach else "", reach.speed_up if reach else None),
            cell(run.study, run.study, "text"),
            cell("" if run.trial is None else str(run.trial), run.trial),
            cell(human(final[0]), final[0]),
            cell(human(reach.tokens) if reach else "", reach.tokens if reach else None),
            *(cell(human(run.costs.get(key)), run.costs.get(key)) for key in ("params", "active_params")),
            cell(human_bytes(run.costs.get("state_bytes")), run.costs.get("state_bytes")),
            cell(human(speed), speed),
            cell(run.status, run.status, "text"),
        ]
        style = "dim" if not run.complete else "first" if index == 0 else ""
        rows.append({"trial": run.run_id, "style": style, "cells": cells})
    return {"columns": columns, "rows": rows}


def _pool_table(group: Group) -> dict[str, Any] | None:
    pools = group.pools()
    columns = [{"name": name, "help": "", "text": name == "run"} for name in ("run", "seeds", "mean loss", "± 95%")]
    rows = [
        {
            "trial": None,
            "style": "",
            "cells": [
                cell(pool.name, pool.name, "text"),
                cell(str(pool.seeds), pool.seeds),
                cell(f"{pool.mean:.4f}", pool.mean),
                cell("" if pool.half is None else f"{pool.half:.4f}", pool.half),
            ],
        }
        for pool in pools
    ]
    return {"columns": columns, "rows": rows} if pools else None


def _colors(comparison: Comparison, group: Group) -> dict[str, str]:
    """Return the colors of the best eight complete runs and of the baselines: a preset's own; other runs are faint."""
    best = [run for run in group.runs if run.complete][:8]
    base = [reach.baseline for run in group.runs if (reach := comparison.reaches[run.run_id])]
    named = {run.run_id: run for run in [*base, *best]}
    wheel = iter(WHEEL * len(named))
    return {key: preset_key(run.preset) if run.preset else next(wheel) for key, run in named.items()}


def _labels(group: Group) -> dict[str, str]:
    """Return names of runs for legends, with study and trial where a name alone is not unique."""
    counts = Counter(run.name for run in group.runs)
    return {run.run_id: run.name if counts[run.name] == 1 else run.title for run in group.runs}


def _series(
    run: Run, colors: Mapping[str, str], names: Mapping[str, str], points: Sequence[tuple[float, float]]
) -> Series:
    color = colors.get(run.run_id, "faint")
    label = "" if color == "faint" else short(names[run.run_id], 34)
    return Series(run.run_id, run.title, color, label, points, hollow=not run.complete)


def _csv_row(group: Group, run: Run, reach: Reach | None) -> list[Any]:
    last = run.points[-1] if run.points else (None, None)
    values: dict[str, Any] = {
        **run.costs,
        "group": group.title,
        "seed": " ".join(run.seeds),
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


def _baseline(runs: Sequence[Run], wanted: str | None) -> str | None:
    """Return what a group's runs are set against: as asked, else the reference that was trained, else the best run.

    None where nothing of the group, or not what was asked for, was trained to its end.
    """
    full = sorted((run for run in runs if run.complete), key=_by_loss)
    if wanted is not None:
        return wanted if any(_is(run, wanted) for run in full) else None
    if not full:
        return None
    for reference in dict.fromkeys(run.reference for run in runs):
        if reference is not None and any(_is(run, reference) for run in full):
            return reference
    best = full[0]
    return best.preset or (best.study if best.trial is None else f"{best.study}/{best.trial}")


def _check_baseline(runs: Sequence[Run], baseline: str) -> None:
    """Raise StudyError for a baseline that no run is, or that none was trained to its end."""
    named = [run for run in runs if _is(run, baseline)]
    if not named:
        known = _known(runs)
        raise StudyError(
            f"no run is baseline {baseline!r}{suggest(baseline, known)}", field="baseline", got=baseline, allowed=known
        )
    if not any(run.complete for run in named):
        raise StudyError(
            f"baseline {baseline!r} did not train to its end in any study; choose another baseline=",
            field="baseline",
            got=baseline,
            allowed=_known(run for run in runs if run.complete),
        )


def _reaches(group: Group) -> dict[str, Reach | None]:
    """Return what each run of a group needed to reach the baseline of its study, or the best one of the group."""
    if group.baseline is None:
        return {run.run_id: None for run in group.runs}
    full = sorted((run for run in group.runs if run.complete and _is(run, group.baseline)), key=_by_loss)
    found: dict[str, Reach | None] = {}
    for run in group.runs:
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
