"""Loss curves and scatter plots as charts for a page: hover, zoom, export, and vector graphics on paper.

A chart is data and layout for plotly.js (MIT license), whose file lies beside this module and becomes part of each
page, so that a page needs no network. Nothing depends on time or on random ids: equal data gives equal text.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hybridnas.analysis.pareto import staircase
from hybridnas.report.colors import LIGHT
from hybridnas.units import human, human_bytes

LIBRARY = Path(__file__).parent / "static" / "plotly-basic.min.js"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MARKS = ("circle", "square", "diamond", "triangle-up", "star", "cross", "hexagon", "triangle-down", "x")
_HOVER = "%{text}<br>%{xaxis.title.text}: %{customdata}<br>%{yaxis.title.text}: %{y:.4f}<extra></extra>"


@dataclass(frozen=True)
class Series:
    """One trial in a chart: its curve, or its figure against the loss. A label makes it stand out."""

    number: int | str  # what the page's rows carry as data-trial
    title: str  # shown while the pointer rests on it
    color: str = "faint"  # a key of colors.LIGHT
    label: str = ""  # in the legend
    points: Sequence[tuple[float, float]] = ()
    hollow: bool = False  # not a full trial


@dataclass(frozen=True)
class Axis:
    """A horizontal axis of a scatter plot."""

    label: str
    log: bool = False
    in_bytes: bool = False
    target: float | None = None  # a value that all candidates were matched to


@dataclass(frozen=True)
class Chart:
    """What plotly.js draws, and how high [pixels]."""

    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int = 400

    @property
    def json(self) -> str:
        """Return data and layout as JSON that may stand inside a script element."""
        text = json.dumps({"data": self.data, "layout": self.layout}, allow_nan=False, separators=(",", ":"))
        return text.replace("<", "\\u003c")


@lru_cache(maxsize=1)
def library() -> str:
    """Return the source of plotly.js."""
    return LIBRARY.read_text(encoding="utf-8")


def layout(xlabel: str, ylabel: str, **more: Any) -> dict[str, Any]:
    """Return the layout that all charts share; ``more`` is merged into it, axes by their settings."""
    axis = {
        "gridcolor": LIGHT["grid"],
        "linecolor": LIGHT["muted"],
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": LIGHT["muted"]},
        "fixedrange": False,
    }
    found: dict[str, Any] = {
        "autosize": True,
        "margin": {"l": 50, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 12,
            "color": LIGHT["ink"],
        },
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": LIGHT["card"], "bordercolor": LIGHT["muted"], "font": {"color": LIGHT["ink"]}},
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "showlegend": True,
        "xaxis": {**axis, "title": _title(xlabel)},
        "yaxis": {**axis, "title": _title(ylabel)},
    }
    for key, value in more.items():
        found[key] = {**found[key], **value} if isinstance(found.get(key), dict) else value
    return found


def curves(series: Sequence[Series], marks: Sequence[float] = ()) -> list[Chart]:
    """Return losses over training tokens, and their last third at the scale of what is labeled; none without points.

    ``marks``: token counts at which a dashed line stands.
    """
    drawn = [line for line in series if line.points]
    if not drawn:
        return []
    end = max(line.points[-1][0] for line in drawn)
    start = min(line.points[0][0] for line in drawn)
    close = [line for line in drawn if len(line.points) > 3 and line.points[-1][0] > 0.9 * end]
    late = [loss for line in drawn for tokens, loss in line.points if tokens >= 0.2 * end]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low or 1)
    wide = {"type": "log"} if start > 0 and end / start > 30 else {"tickformat": "~s"}
    words = ("training tokens", "validation loss [nats/token]")
    first = layout(*words, xaxis=wide, yaxis={"range": [low - margin, high + 3 * margin]}, shapes=_lines(marks))
    found = [Chart(_curve_traces(drawn), first)]
    if close:
        labeled = [line for line in close if line.label] or close
        losses = [loss for line in labeled for tokens, loss in line.points if tokens > 0.7 * end]
        margin = 0.08 * (max(losses) - min(losses) or 1)
        near = {"range": [min(losses) - margin, max(losses) + margin]}
        last = layout(
            "training tokens, the last third", words[1], yaxis=near,
            xaxis={"range": [0.7 * end, 1.01 * end], "tickformat": "~s"}, shapes=_lines(marks), showlegend=False,
        )  # fmt: skip
        found.append(Chart(_curve_traces(close), last))
    return found


def curve(points: Sequence[tuple[float, float]], color: str, title: str) -> Chart:
    """Return the one curve of a trial."""
    traces = _curve_traces([Series("", title, color, title, points)])
    return Chart([{**traces[0], "showlegend": False}], layout("training tokens", "validation loss [nats/token]",
                 xaxis={"tickformat": "~s"}), 260)  # fmt: skip


def scatter(
    panels: Sequence[tuple[Axis, Sequence[Series]]],
    *,
    front: bool = False,
    ylabel: str = "validation loss [nats/token]",
    joined: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[Chart]:
    """Return final losses against a figure, one chart for each panel; none without points.

    Each series has one point (figure, loss). Hollow points are trials that were stopped early. ``front``: join those
    that none beats to the lower left. ``joined``: for each panel the points that a line joins, where the front is not
    what lies to the lower left.
    """
    found = []
    for index, (axis, lines) in enumerate(panels):
        drawn = [line for line in lines if line.points]
        if not drawn:
            continue
        settings, place = _scale(axis, [line.points[-1][0] for line in drawn])
        traces: list[dict[str, Any]] = []
        best = staircase([line.points[-1] for line in drawn if not line.hollow]) if front else []
        shape = "hv"
        if index < len(joined):
            best, shape = sorted(joined[index]), "linear"
        if len(best) > 1:
            traces.append({
                "type": "scatter", "mode": "lines", "x": [place(x) for x, _ in best], "y": [y for _, y in best],
                "line": {"color": LIGHT["muted"], "width": 1, "shape": shape}, "hoverinfo": "skip", "showlegend": False,
            })  # fmt: skip
        written = human_bytes if axis.in_bytes else human
        labels = iter(MARKS * len(drawn))
        for line in sorted(drawn, key=lambda line: bool(line.label)):
            x, y = line.points[-1]
            mark = next(labels) if line.label else "circle"
            traces.append({
                "type": "scatter", "mode": "markers", "x": [place(x)], "y": [y], "meta": line.number,
                "name": html.escape(line.label), "showlegend": bool(line.label), "text": [html.escape(line.title)],
                "customdata": [written(x)], "hovertemplate": _HOVER,
                "marker": {"size": 11 if line.label else 7, "color": LIGHT[line.color],
                           "symbol": mark + "-open" if line.hollow else mark, "line": {"width": 1.3 * line.hollow}},
            })  # fmt: skip
        shapes = [] if axis.target is None else _lines([axis.target])
        found.append(Chart(traces, layout(axis.label, ylabel, xaxis=settings, shapes=shapes), 380))
    return found


def _curve_traces(drawn: Iterable[Series]) -> list[dict[str, Any]]:
    """Return one line for each series, what has no label first, the others by their last loss."""
    order = sorted(drawn, key=lambda line: (bool(line.label), line.points[-1][1] if line.label else 0.0))
    traces, labels = [], 0
    for line in order:
        xs, ys = zip(*line.points, strict=True)
        strong = bool(line.label)
        traces.append({
            "type": "scatter", "mode": "lines+markers", "x": xs, "y": ys, "meta": line.number, "showlegend": strong,
            "name": html.escape(f"{line.label} {ys[-1]:.4f}"), "text": [html.escape(line.title)] * len(xs),
            "customdata": [human(x) for x in xs], "hovertemplate": _HOVER,
            "line": {"color": LIGHT[line.color], "width": 2 if strong else 1},
            "marker": {"size": 6 if strong else 3, "color": LIGHT[line.color],
                       "symbol": MARKS[labels % len(MARKS)] if strong else "circle"},
        })  # fmt: skip
        labels += strong
    return traces


def _scale(axis: Axis, xs: Sequence[float]) -> tuple[dict[str, Any], Any]:
    """Return a horizontal axis' settings, and what turns a value into its place on it."""
    low, high = min(xs), max(xs)
    if axis.in_bytes and high > 0:
        least = min(x for x in xs if x > 0)
        none = least / 4  # models without any state stand left of the others
        first = math.log2(least)
        steps = max(1, math.ceil((math.log2(high) - first) / 4))
        ticks = [2 ** (first + steps * i) for i in range(5) if 2 ** (first + steps * i) <= high * 1.01]
        if high / least < 2:
            ticks = list(dict.fromkeys([least, high]))
        texts = [human_bytes(tick) for tick in ticks]
        if low == 0:
            ticks, texts = [none, *ticks], ["0 B", *texts]
        start = math.log10(none if low == 0 else least)
        margin = max(0.06 * (math.log10(high) - start), 0.05)
        range_ = [start - margin, math.log10(high) + margin]
        return {"type": "log", "tickvals": ticks, "ticktext": texts, "range": range_}, lambda x: x or none
    if axis.log and low > 0 and high / low > 3:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [one * 10.0**power for power in powers for one in (1, 2, 5)]
        near = [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]
        return {"type": "log", "tickvals": near, "ticktext": [human(tick) for tick in near]}, float
    if axis.target:
        reach = max([abs(x - axis.target) for x in xs] + [0.02 * axis.target]) * 1.3
        return {"range": [axis.target - reach, axis.target + reach], "nticks": 5, "tickformat": ".3~s"}, float
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 1.0
    return {"range": [low - margin, high + margin], "nticks": 5, "tickformat": ".3~s"}, float


def _lines(places: Sequence[float]) -> list[dict[str, Any]]:
    """Return dashed vertical lines."""
    style = {"color": LIGHT["muted"], "width": 1, "dash": "dash"}
    across = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": style}
    return [{**across, "x0": place, "x1": place} for place in places]


def _title(text: str) -> dict[str, Any]:
    return {"text": html.escape(text), "font": {"color": LIGHT["muted"], "size": 12}, "standoff": 6}
