"""The report's further charts: effects with intervals, shares as bars, the course of a search over trained tokens."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from hybridnas.analysis.effects import Effect
from hybridnas.draw.palette import color as letter_color
from hybridnas.report.colors import LIGHT, WHEEL
from hybridnas.report.plots import Chart, Series, layout
from hybridnas.units import human


def effects(positions: Sequence[Effect], letters: Sequence[Effect], unit: str) -> list[Chart]:
    """Return effects as dots with intervals: one chart by position, one of one more sub-layer of each letter."""
    known = sorted({effect.letter for effect in (*positions, *letters)})
    found = []
    if positions:
        step = 0.7 / max(len(known), 1)
        traces = [
            _intervals(
                [(e.position or 0) + step * (index - (len(known) - 1) / 2) for e in positions if e.letter == letter],
                [effect for effect in positions if effect.letter == letter],
                _color(letter, index),
                letter,
            )
            for index, letter in enumerate(known)
        ]
        last = max(effect.position or 0 for effect in positions)
        axis = {"range": [0.5, last + 0.5], "dtick": 1, "tick0": 1}
        found.append(_effects_chart(traces, positions, "sub-layer, from the input", unit, axis))
    if letters:
        traces = [
            _intervals([index], [effect], _color(effect.letter, known.index(effect.letter)), effect.letter)
            for index, effect in enumerate(letters)
        ]
        names = [html.escape(effect.letter) for effect in letters]
        axis = {"tickvals": list(range(len(letters))), "ticktext": names, "range": [-0.6, len(letters) - 0.4]}
        found.append(_effects_chart(traces, letters, "one sub-layer more", unit, axis))
    return found


def _color(letter: str, index: int) -> str:
    """Return the color of a letter, which is that of drawings, or of a parallel layer."""
    return letter_color(letter) if len(letter) == 1 else LIGHT[WHEEL[index % len(WHEEL)]]


def _intervals(places: Sequence[float], shown: Sequence[Effect], color: str, letter: str) -> dict[str, Any]:
    clear = ["circle" if abs(effect.mean) > effect.half else "circle-open" for effect in shown]
    return {
        "type": "scatter", "mode": "markers", "x": places, "y": [effect.mean for effect in shown],
        "error_y": {"type": "data", "array": [effect.half for effect in shown], "width": 0, "color": color},
        "marker": {"color": color, "size": 9, "symbol": clear}, "name": html.escape(letter),
        "hovertemplate": f"{html.escape(letter)}: %{{y:+.4f}} ± %{{error_y.array:.4f}}<extra></extra>",
    }  # fmt: skip


def _effects_chart(
    traces: Sequence[Mapping[str, Any]], shown: Sequence[Effect], xlabel: str, unit: str, axis: Mapping[str, Any]
) -> Chart:
    """Frame the effects, and of intervals what is near: that of two architectures may be a hundred times as wide."""
    largest = max(abs(effect.mean) for effect in shown)
    ends = [effect.mean + sign * min(effect.half, 2 * largest) for effect in shown for sign in (-1, 1)]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "layer": "below"}
    shapes = [{**zero, "line": {"color": LIGHT["muted"], "width": 1, "dash": "dash"}}]
    frame = {"range": [min(ends) - margin, max(ends) + margin]}
    return Chart(traces, layout(xlabel, f"effect [{unit}], less is better", xaxis=axis, yaxis=frame, shapes=shapes))


def bars(shares: Mapping[str, float]) -> list[Chart]:
    """Return shares, which sum to 1, as horizontal bars with their figures, the largest on top; none without any."""
    shown = sorted(shares.items(), key=lambda item: item[1])[-14:]
    if not shown:
        return []
    trace = {
        "type": "bar", "orientation": "h", "x": [share for _, share in shown],
        "y": [html.escape(key) for key, _ in shown], "marker": {"color": LIGHT["c2"]},
        "text": [f"{share:.0%}" for _, share in shown], "textposition": "outside", "cliponaxis": False,
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }  # fmt: skip
    hidden = {"visible": False, "range": [0, 1.15 * max(share for _, share in shown)]}
    return [Chart([trace], layout("", "", xaxis=hidden, showlegend=False), 60 + 28 * len(shown))]


def course(lines: Sequence[Series], dots: Sequence[Series], unit: str) -> list[Chart]:
    """Return the best score so far of each search over the tokens that it trained, as steps; none without points.

    ``dots``: full trials at the tokens that were trained by their end, one point each.
    """
    drawn = [line for line in lines if line.points]
    if not drawn:
        return []
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "markers", "x": [x], "y": [y], "text": [html.escape(dot.title)], "meta": dot.number,
         "marker": {"color": LIGHT[dot.color], "size": 7}, "showlegend": False, "customdata": [human(x)],
         "hovertemplate": "%{text}<br>after %{customdata} tokens: %{y:.4f}<extra></extra>"}
        for dot in dots for x, y in dot.points
    ]  # fmt: skip
    for line in drawn:
        xs, ys = zip(*line.points, strict=True)
        traces.append({
            "type": "scatter", "mode": "lines", "x": xs, "y": ys, "name": html.escape(line.label),
            "line": {"color": LIGHT[line.color], "width": 2, "shape": "hv"},
            "text": [html.escape(line.title)] * len(xs), "customdata": [human(x) for x in xs],
            "hovertemplate": "%{text}, best so far<br>after %{customdata} tokens: %{y:.4f}<extra></extra>",
        })  # fmt: skip
    axis = {"rangemode": "tozero", "tickformat": "~s"}
    return [Chart(traces, layout("tokens trained by the whole search", unit, xaxis=axis), 360)]
