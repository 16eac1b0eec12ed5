"""A ladder's figure: loss over training compute, the fitted laws and their predictions, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.draw.figure import FAINT, SETTINGS, save, series_style
from hybridnas.ladders.rows import Row, mean_losses
from hybridnas.ladders.verdict import AHEAD, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE = 40  # points of a drawn law


def draw(rows: Sequence[Row], verdict: Verdict, target: int, out: Path) -> tuple[Path, ...]:
    """Draw loss over compute as ``out``.svg and ``out``.png; returns the files.

    Left: every annealed model, the mean over seeds, one line for each size. Right: the laws along the largest tokens
    per parameter, up to 100 times the compute, with the intervals; sizes that a fit was tested on are hollow.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    laws = any(model.fit is not None for model in verdict.models)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(11.5 if laws else 7.5, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(figure.subplots(1, 2 if laws else 1, squeeze=False)[0])
        _measured(panels[0], rows)
        if laws:
            _laws(panels[1], rows, verdict, target)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8.5)
        return tuple(save(figure, out))


def _measured(ax: Axes, rows: Sequence[Row]) -> None:
    flops = {(row.model, row.size, row.tokens): row.flops for row in rows}
    means = mean_losses(rows)
    for index, model in enumerate(dict.fromkeys(row.model for row in rows)):
        for place, size in enumerate(sorted({row.size for row in rows if row.model == model})):
            points = sorted((flops[key], loss) for key, loss in means.items() if key[:2] == (model, size))
            style = series_style(index, 4.5, name=model)
            ax.plot(*zip(*points, strict=True), lw=1.0, label=None if place else model, **style)
    _frame(ax, "measured: a line for each size, a point for each annealing")


def _laws(ax: Axes, rows: Sequence[Row], verdict: Verdict, target: int) -> None:
    order = list(dict.fromkeys(row.model for row in rows))
    top = max(row.size for row in rows)
    ratio = max(row.tokens for row in rows if row.size == top) / (target * top)
    low, high = target * min(row.size for row in rows), target * top * AHEAD[-1] ** 0.5
    for model in verdict.models:
        own = [row for row in rows if row.model == model.name]
        style = series_style(order.index(model.name), 4.5, name=model.name)
        per_token = {row.active_params: row.flops / row.tokens for row in own}
        hidden = {one.size for one in model.held_out}
        last = {row.size: max(other.tokens for other in own if other.size == row.size) for row in own}
        for row in own:
            if row.tokens == last[row.size]:
                fill = {"mfc": "none"} if row.size in hidden else {}
                ax.plot([row.flops], [row.valid_loss], ls="", **{**style, **fill})
        if model.fit is None:
            continue
        line = [low * (high / low) ** (i / (_LINE - 1)) for i in range(_LINE)]
        found = [model.fit.predict(n, ratio * n) for n in line]
        compute = [_per_token(per_token, n) * ratio * n for n in line]
        ax.plot(compute, [one.value for one in found], lw=1.3, color=style["color"])
        ax.fill_between(
            compute, [one.low for one in found], [one.high for one in found], color=style["color"], alpha=0.13, lw=0
        )
    _frame(ax, f"laws at {ratio:.0f} tokens per parameter; hollow: held out")
    ax.axvline(max(row.flops for row in rows), color=FAINT, lw=0.8, ls=":")


def _per_token(known: dict[int, float], params: float) -> float:
    """Return training FLOPs per token at a size: a power law through the smallest and the largest known one."""
    import math

    least, most = min(known), max(known)
    if least == most:
        return known[least] * params / least
    power = math.log(known[most] / known[least]) / math.log(most / least)
    return known[most] * math.pow(params / most, power)


def _frame(ax: Axes, title: str) -> None:
    ax.set_xscale("log")
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("training compute [FLOP]")
    ax.set_ylabel("validation loss [nats/token]")
