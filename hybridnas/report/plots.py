"""Loss curves and scatter plots as inline SVG whose colors are CSS variables, for light, dark and printed pages.

matplotlib draws with stand-in colors, which are then replaced by ``var(--name)``; nothing depends on time or on
random ids, so equal data gives equal text.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from hybridnas.analysis.pareto import staircase
from hybridnas.units import human, human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# CSS variable -> the color that stands for it while matplotlib draws.
COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "faint": "#040404",
    "winner": "#050505",
    "c1": "#0b0b0b",
    "c2": "#0c0c0c",
    "c3": "#0d0d0d",
    "c4": "#0e0e0e",
    "c5": "#0f0f0f",
    "c6": "#101010",
    "c7": "#111111",
    "c8": "#121212",
}
_VARIABLES = {color: variable for variable, color in COLORS.items()}
_STAND_INS = re.compile("|".join(_VARIABLES))
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "hybridnas",
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["muted"],
    "axes.labelcolor": COLORS["muted"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "text.color": COLORS["ink"],
    "axes.linewidth": 0.8,
    "grid.color": COLORS["grid"],
    "grid.linewidth": 0.7,
}


@dataclass(frozen=True)
class Series:
    """One trial in a plot: its curve, or its figure against the loss. A label makes it stand out."""

    number: int | str  # what the page's rows carry as data-trial
    title: str  # shown while the pointer rests on it
    color: str = "faint"  # a key of COLORS
    label: str = ""
    points: Sequence[tuple[float, float]] = ()
    hollow: bool = False  # not a full trial


@dataclass(frozen=True)
class Axis:
    """A horizontal axis of a scatter plot."""

    label: str
    log: bool = False
    in_bytes: bool = False
    target: float | None = None  # a value that all candidates were matched to


def curves_svg(series: Sequence[Series], name: str = "curves", marks: Sequence[float] = ()) -> str:
    """Draw losses over training tokens: labeled series in color on top, all others faint; empty without points.

    ``marks``: token counts at which a dashed line stands.
    """
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    end = max(line.points[-1][0] for line in drawn)
    close = [line for line in drawn if len(line.points) > 3 and line.points[-1][0] > 0.9 * end]
    with drawing() as (figure, axes):
        figure.set_size_inches(10, 4.4)
        figure.subplots_adjust(left=0.06, right=0.77, top=0.97, bottom=0.12, wspace=0.14)
        panels = axes(2 if close else 1, share=False)
        for index, ax in enumerate(panels):
            for line in sorted(drawn if index == 0 else close, key=lambda line: bool(line.label)):
                _curve(ax, line, f"{name}{index}")
            _frame_curves(ax, drawn)
            for mark in marks:
                ax.axvline(mark, color=COLORS["muted"], lw=0.8, ls=(0, (3, 3)), zorder=0)
        if close:
            _zoom(panels[1], close, end)
        _end_labels(panels[-1], [line for line in close or drawn if line.label])
        return svg_text(figure, name, drawn)


def scatter_svg(
    panels: Sequence[tuple[Axis, Sequence[Series]]],
    name: str,
    *,
    front: bool = False,
    ylabel: str = "validation loss [nats/token]",
    joined: Sequence[Sequence[tuple[float, float]]] = (),
) -> str:
    """Draw final losses against a figure, one panel beside the other on a common loss axis; ``front``: lower left.

    ``joined``: for each panel the points that a line joins, where the front is not what lies to the lower left.
    Each series has one point (figure, loss). Hollow points are trials that were stopped early.
    """
    if not any(line.points for _, lines in panels for line in lines):
        return ""
    with drawing() as (figure, axes):
        figure.set_size_inches(10, 4.2)
        figure.subplots_adjust(left=0.065, right=0.98, top=0.96, bottom=0.14, wspace=0.1)
        for index, (ax, (axis, lines)) in enumerate(zip(axes(len(panels)), panels, strict=True)):
            drawn = [line for line in lines if line.points]
            for line in sorted(drawn, key=lambda line: bool(line.label)):
                _dot(ax, line, f"{name}{index}")
            _frame_scatter(ax, axis, drawn)
            if front:
                _front(ax, drawn)
            if index < len(joined) and len(joined[index]) > 1:
                ax.plot(*zip(*sorted(joined[index]), strict=True), color=COLORS["muted"], lw=1, zorder=1)
            ax.set_ylabel(ylabel if index == 0 else "")
            ax.tick_params(labelleft=index == 0)
        every = [line for _, lines in panels for line in lines]
        return svg_text(figure, name, every)


@contextlib.contextmanager
def drawing() -> Iterator[tuple[Figure, Callable[..., list[Axes]]]]:
    """Yield a figure under our settings and a function that makes its panels, without pyplot's global state."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure()
        FigureCanvasSVG(figure)

        def axes(count: int, *, share: bool = True) -> list[Axes]:
            return list(figure.subplots(1, count, sharey=share, squeeze=False)[0])

        yield figure, axes


def _curve(ax: Axes, line: Series, name: str) -> None:
    strong = bool(line.label)
    xs, ys = zip(*line.points, strict=True)
    width, mark = (2.0, 3.0) if strong else (0.9, 1.6)
    (curve,) = ax.plot(xs, ys, color=COLORS[line.color], lw=width, marker="o", ms=mark)
    curve.set_gid(_gid(name, line))


def _zoom(ax: Axes, close: Sequence[Series], end: float) -> None:
    """Show the last third of the budget, at the scale of what is labeled: there the order is decided."""
    labeled = [line for line in close if line.label] or list(close)
    losses = [loss for line in labeled for tokens, loss in line.points if tokens > 0.7 * end]
    low, high = min(losses), max(losses)
    margin = 0.08 * (high - low or 1)
    if ax.get_xscale() == "log":
        ax.set_xscale("linear")
        token_ticks(ax)
    ax.set_xlim(0.7 * end, 1.01 * end)
    ax.set_ylim(low - margin, high + margin)
    ax.set_ylabel("")
    ax.set_xlabel("the last third")


def _frame_curves(ax: Axes, drawn: Sequence[Series]) -> None:
    end = max(line.points[-1][0] for line in drawn)
    start = min(line.points[0][0] for line in drawn)
    if start > 0 and end / start > 30:
        ax.set_xscale("log")
    late = [loss for line in drawn for tokens, loss in line.points if tokens >= 0.2 * end]
    late = late or [loss for line in drawn for _, loss in line.points]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low or 1)
    ax.set_ylim(low - margin, high + 3 * margin)  # the first steep fall may run out at the top
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    ax.set_xlabel("training tokens")
    ax.set_ylabel("validation loss [nats/token]")
    token_ticks(ax)
    ax.tick_params(which="both", length=0)


def token_ticks(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: human(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _end_labels(ax: Axes, labeled: Sequence[Series]) -> None:
    """Write each label beside the end of its curve, pushed apart where ends are close."""
    low, high = ax.get_ylim()
    gap = 0.055
    ordered = sorted((line for line in labeled if line.points), key=lambda line: line.points[-1][1])
    wanted = [((line.points[-1][1] - low) / (high - low), line) for line in ordered]
    places: list[float] = []
    for height, _ in wanted:
        places.append(max(height, places[-1] + gap) if places else max(height, 0.0))
    over = max(0.0, places[-1] - 1.0) if places else 0.0
    for place, (_, line) in zip(places, wanted, strict=True):
        ax.text(
            1.015, place - over, f"{line.points[-1][1]:.3f}  {line.label}", color=COLORS[line.color],
            transform=ax.transAxes, va="center", weight="bold" if line.color == "winner" else "normal", fontsize=9.5,
        )  # fmt: skip


def _dot(ax: Axes, line: Series, name: str) -> None:
    (x, y), color = line.points[-1], COLORS[line.color]
    strong = bool(line.label)
    (dot,) = ax.plot(
        [x], [y], marker="o", ls="", ms=9 if strong else 6, mec=color, mew=1.3, mfc="none" if line.hollow else color
    )
    dot.set_gid(_gid(name, line))


def _frame_scatter(ax: Axes, axis: Axis, drawn: Sequence[Series]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    xs = [line.points[-1][0] for line in drawn]
    written = human_bytes if axis.in_bytes else human
    if axis.in_bytes and xs and min(xs) > 0:
        ax.set_xscale("log", base=2)
        if max(xs) / min(xs) < 8:
            ax.set_xticks(sorted(set(xs))[:6])
    elif axis.in_bytes and max(xs, default=0) > 0:  # some have no state at all: they stand left of the powers of two
        least = min(x for x in xs if x > 0)
        ax.set_xscale("symlog", base=2, linthresh=least, linscale=0.7)
        ax.set_xticks([0, *(least * 4**i for i in range(9) if least * 4**i <= max(xs))])
    elif axis.log and xs and min(xs) > 0 and max(xs) / min(xs) > 3:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))  # decades alone may leave one tick
    elif axis.target:
        reach = max([abs(x - axis.target) for x in xs] + [0.02 * axis.target]) * 1.3
        ax.set_xlim(axis.target - reach, axis.target + reach)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    else:
        ax.margins(x=0.12)
        ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.margins(y=0.12)
    if axis.target:
        ax.axvline(axis.target, color=COLORS["muted"], lw=1, ls=(0, (3, 3)), zorder=0)
    ax.grid(visible=True)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", length=0)
    ax.set_xlabel(axis.label)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.autoscale_view()
    _point_labels(ax, [line for line in drawn if line.label])


def _point_labels(ax: Axes, labeled: Sequence[Series]) -> None:
    """Write labels beside their points, to the inner side, pushed apart where points are close."""
    (left, _), (right, _) = ax.transAxes.transform([(0, 0), (1, 0)])
    sides: dict[bool, list[tuple[float, float, Series]]] = {True: [], False: []}
    for line in labeled:
        x, y = ax.transData.transform(line.points[-1])
        sides[bool(x > left + 0.55 * (right - left))].append((float(y), float(x), line))
    inches = 72 / ax.figure.dpi  # points per pixel
    for inner, labels in sides.items():
        above = float("-inf")
        for y, _, line in sorted(labels, key=lambda item: item[:2]):
            place = max(y + 7 / inches, above + 13 / inches)  # clear of a line that runs on to the side
            above = place
            ax.annotate(
                line.label, line.points[-1], (-8 if inner else 8, (place - y) * inches), textcoords="offset points",
                va="center", ha="right" if inner else "left", color=COLORS[line.color], fontsize=9,
            )  # fmt: skip


def _front(ax: Axes, drawn: Sequence[Series]) -> None:
    """Join the points that no other beats in both figures, as a staircase."""
    best = staircase([line.points[-1] for line in drawn if not line.hollow])
    if len(best) > 1:
        xs, ys = zip(*best, strict=True)
        ax.step(xs, ys, where="post", color=COLORS["muted"], lw=1, zorder=1)


def _gid(name: str, line: Series) -> str:
    return f"{name}--{line.number}"


def svg_text(figure: Figure, name: str, series: Iterable[Series]) -> str:
    """Return the figure as an SVG element for a page: unique ids, CSS colors, titles on hover, no size of its own."""
    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(written.getvalue())
    titles = {str(line.number): line.title for line in series}
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        for child in [child for child in element if _local(child.tag) in ("metadata", "style")]:
            element.remove(child)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(_local(key), _attribute(_local(key), value, name))
        _, marked, number = element.get("id", "").partition("--")
        if marked:
            element.attrib = {"class": "trial", "data-trial": number}
            title = ElementTree.Element("title")
            title.text = titles.get(number, number)
            element.insert(0, title)
    root.attrib = {"class": "plot", "role": "img", "viewBox": root.attrib["viewBox"]}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """Return an XML name without its namespace: inline SVG has none."""
    return name.rpartition("}")[2]


def _attribute(key: str, value: str, name: str) -> str:
    """Return an attribute's value with ids of this figure alone, CSS variables as colors, and the page's font."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key == "style":
        kept = [part for part in value.split(";") if not part.strip().startswith("font-family")]
        value = ";".join(kept)
    value = value.replace("url(#", f"url(#{name}-")
    return _STAND_INS.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", value)
