"""A suite's figure: scores per task, accuracy over state, accuracy by length, or loss curves; ours beside published."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hybridnas.draw.figure import FAINT, MARKS, SETTINGS, save, series_style
from hybridnas.suites import results, speed
from hybridnas.suites.results import Row
from hybridnas.suites.suite import Suite
from hybridnas.units import human, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hybridnas.suites.runner import Outcome

_DASHES = ("-", "--", ":", "-.")


def draw(suite: Suite, outcome: Outcome, out: Path) -> list[Path]:
    """Draw the suite's figure as SVG and PNG beside ``out``; returns the files, none where there is nothing to draw."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    painters = {"tasks": _tasks, "widths": _widths, "state": _state, "lengths": _lengths, "curves": _curves}
    painters["contexts"] = _contexts
    rows = [row for row in results.choose(outcome.rows, suite) if row.chosen and row.score is not None]
    if not rows:
        return []
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.2, 4.8), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        painters[suite.figure](ax, suite, rows, outcome)
        ax.set_title(suite.title, loc="left", fontsize=11, weight="bold")
        handles, labels = ax.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
        return save(figure, out)


def _tasks(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """One place per column of the table, or one per model where there is one column; ours filled, published hollow."""
    ours, columns = results.scores(rows, suite), suite.columns
    if len(columns) == 1:
        _one_task(ax, suite, {model: own[columns[0]] for model, own in ours.items() if columns[0] in own})
        return
    scale = 100 if suite.higher else 1
    for index, (model, own) in enumerate(ours.items()):
        places = [(i, scale * own[c]) for i, c in enumerate(columns) if c in own]
        ax.plot(*_pairs(places), ls="-", lw=0.8, alpha=0.9, label=model, **series_style(index, name=model))
    for index, row in enumerate(suite.published):
        places = [(i, row.values[c]) for i, c in enumerate(columns) if c in row.values]
        if not places:  # measured on other settings: in the table alone
            continue
        mark = MARKS[index % len(MARKS)]
        ax.plot(*_pairs(places), ls="", mfc="none", mec=FAINT, marker=mark, label=f"{row.model} [published]")
    ax.set_xticks(range(len(columns)), [column.replace(" ", "\n", 1) for column in columns])
    ax.set_ylabel(_unit(suite))
    if suite.higher:
        ax.set_ylim(-3, 103)


def _one_task(ax: Axes, suite: Suite, ours: dict[str, float]) -> None:
    """A line per model, the best first, its score along it."""
    scale, (column,) = 100 if suite.higher else 1, suite.columns
    found = [(scale * score, model, False) for model, score in ours.items()]
    found += [(row.values[column], f"{row.model} [published]", True) for row in suite.published if column in row.values]
    found.sort(key=lambda one: one[0], reverse=not suite.higher)
    own = series_style(0)["color"]
    for place, (score, _, published) in enumerate(found):
        ax.plot([score], [place], ls="", marker="o", mec=FAINT if published else own, mfc="none" if published else own)
    ax.set_yticks(range(len(found)), [model for _, model, _ in found])
    ax.set_xlabel(f"{column}, {_unit(suite)}")
    if suite.higher:
        ax.set_xlim(-3, 103)


def _widths(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """Accuracy over d_model: a colour for each architecture, a dash for each task."""
    for index, (model, own) in enumerate(results.grouped(rows, lambda row: _family(row.model)).items()):
        by_task = results.grouped(own, lambda row: row.task)
        for dash, (task, same) in zip(itertools.cycle(_DASHES), by_task.items(), strict=False):
            by_width = results.grouped(same, lambda row: row.d_model)
            points = sorted(
                (width, 100 * fmean(row.score or 0.0 for row in group)) for width, group in by_width.items()
            )
            style = series_style(index, name=model)
            style |= {"ls": dash, "mfc": style["color"] if dash == "-" else "none"}
            ax.plot(*_pairs(points), lw=1.4, label=f"{model}; {task}", **style)
    widths = sorted({row.d_model for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.minorticks_off()
    ax.set_xlabel("d_model")
    ax.set_ylabel(_unit(suite))
    ax.set_ylim(-3, 103)


def _state(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """Accuracy over the bytes that a sequence carries: one line per pattern, one point per width or state size."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for index, (model, own) in enumerate(results.grouped(rows, lambda row: _family(row.model)).items()):
        by_state = results.grouped(own, lambda row: row.state_bytes)
        points = sorted((state, 100 * max(_by_model(group))) for state, group in by_state.items())
        ax.plot(*_pairs(points), lw=1.2, label=model, **series_style(index, name=model))
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human_bytes(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("state of one sequence at the task's length")
    ax.set_ylabel(_unit(suite))
    ax.set_ylim(-3, 103)


def _lengths(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """Accuracy by length, mean over seeds; the published rows dashed."""
    by_model: dict[str, dict[int, list[float]]] = {}
    several = len({row.task for row in outcome.lengths}) > 1
    for row in outcome.lengths:
        if row.accuracy is not None:
            name = f"{row.model}; {row.task}" if several else row.model
            by_model.setdefault(name, {}).setdefault(row.length, []).append(100 * row.accuracy)
    for index, (model, own) in enumerate(by_model.items()):
        points = [(length, fmean(values)) for length, values in sorted(own.items())]
        ax.plot(*_pairs(points), lw=1.6, label=model, **series_style(index, name=model))
    powers = {results.power_of_two(2**power): 2**power for power in range(31)}
    for index, published in enumerate(suite.published):
        points = [(powers[name], value) for name, value in published.values.items() if name in powers]
        style: dict[str, Any] = {**series_style(index), "color": FAINT, "lw": 0.9, "ls": "--", "mfc": "none", "ms": 3.5}
        ax.plot(*_pairs(points), label=f"{published.model} [published]", **style)
    _trained_at(ax, rows)
    lengths = sorted({row.length for row in outcome.lengths})
    if lengths:
        ax.set_xscale("log", base=2)
        names = (results.power_of_two(length) for length in lengths)
        ax.set_xticks(lengths, [re.sub(r"2\^(\d+)", r"$2^{\1}$", name) for name in names])
        ax.minorticks_off()
    ax.set_xlabel("length [tokens]")
    ax.set_ylabel("accuracy [%]")
    ax.set_ylim(-3, 103)


def _contexts(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """Loss by the context that was trained and measured: a line through the means of the seeds, a dot for each."""
    for index, (model, own) in enumerate(results.grouped(rows, lambda row: row.model).items()):
        style = series_style(index, name=model)
        seen = [(row.seq_len, results.in_unit(row.score or 0.0, suite)) for row in own]
        ax.plot(*_pairs(seen), **{**style, "ls": "", "ms": 3, "alpha": 0.6})
        by_length = results.grouped(own, lambda row: row.seq_len)
        means = [
            (length, fmean(results.in_unit(row.score or 0.0, suite) for row in group))
            for length, group in sorted(by_length.items())
        ]
        ax.plot(*_pairs(means), lw=1.6, label=model, **style)
    lengths = sorted({row.seq_len for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.set_xlabel("context of training and measurement [tokens]")
    ax.set_ylabel(_unit(suite))


def _trained_at(ax: Axes, rows: Iterable[Row]) -> None:
    for length in sorted({row.seq_len for row in rows}):
        ax.axvline(length, color=FAINT, lw=0.8, ls=":")
        ax.text(length, 50, " trained at", color=FAINT, fontsize=8, rotation=90, va="center", ha="right")


def _curves(ax: Axes, suite: Suite, rows: Sequence[Row], outcome: Outcome) -> None:
    """Validation loss over training tokens of the chosen runs, and the baseline's final loss."""
    from matplotlib.ticker import FuncFormatter

    names: dict[str, int] = {}
    seen: list[float] = []
    for row in rows:
        points = speed.points(outcome.curves, row)
        seen += [loss for _, loss in points[len(points) // 5 :]]
        style = series_style(names.setdefault(row.model, len(names)), 2.5, name=row.model)
        ax.plot(*_pairs(points), lw=1.2, label=row.model if row.seed == suite.seeds[0] else None, **style)
    base = next((row.valid_loss for row in rows if row.model == suite.baseline), None)
    if base is not None:
        ax.axhline(base, color=FAINT, lw=0.9, ls="--")
    if seen:
        margin = 0.04 * (max(seen) - min(seen) or 1)
        ax.set_ylim(min(seen) - margin, max(seen) + margin)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    ax.set_xlabel("training tokens")
    ax.set_ylabel("validation loss [nats/token]")


def _family(model: str) -> str:
    """Return a model's name without the sizes that a sweep added."""
    return re.sub(r"(, \w+ [\w.]+)+$", "", model)


def _by_model(rows: Iterable[Row]) -> list[float]:
    """Return each model's mean score over tasks and seeds."""
    return [fmean(row.score or 0.0 for row in own) for own in results.grouped(rows, lambda row: row.model).values()]


def _pairs(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _unit(suite: Suite) -> str:
    return "accuracy [%]" if suite.higher else f"validation loss [{results.unit(suite)}]"
