"""Pictures of an architecture: the residual stream as a line, its layers next to it, repeats folded under a bracket.

Lengths are inches, y grows downwards from 0 at the top of a page.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.folding import Motif
from hybridnas.draw.palette import INK, color, tint
from hybridnas.draw.table import main_sizes
from hybridnas.errors import ConfigError
from hybridnas.files import write_atomic
from hybridnas.registry import BLOCKS
from hybridnas.units import human

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAME = "architecture"  # of the drawing's group in an SVG
FORMATS = ("svg", "png", "pdf")
_SOFT, _LINE, _PAPER, _EMPTY = "#5F6C7B", "#9AA5B1", "#F5F7FA", "#FEFEFE"
_DARK = {INK: "#E9E9EA", _SOFT: "#A7AFB9", _LINE: "#6B7683", _PAPER: "#24272C", _EMPTY: "#1E2024"}
_CARD, _ROW, _INNER_ROW, _SLIM, _GAP = 3.7, 0.52, 0.58, 0.34, 0.16
_LEFT, _LANE, _TALLEST = 0.62, 0.34, 10.5
_CONTEXT: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hybridnas",  # element names, and so the whole file, depend on the architecture alone
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "path.sketch": None,
}


def draw_svg(arch: Arch, path: str | Path) -> Path:
    """Draw an architecture to a file: ``.svg``, ``.png`` or ``.pdf`` by its suffix; returns the path.

    An SVG has a transparent ground and follows the reader's light or dark scheme; the others are on white.
    Raises ConfigError for another suffix. The same architecture gives the same SVG, byte for byte.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise ConfigError(f"drawing {str(path)!r} must end in .{', .'.join(FORMATS)}, got {path.suffix or 'no suffix'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _render(arch, kind))
    return path


def svg_text(arch: Arch) -> str:
    """Return the drawing as SVG text, for embedding in a page."""
    text = _render(arch, "svg").decode()
    return text[text.index("<svg") :]


def _render(arch: Arch, kind: str) -> bytes:
    import matplotlib

    undated = {"svg": {"Date": None, "Title": str(arch.pattern)}, "pdf": {"CreationDate": None}, "png": {}}[kind]
    buffer = io.BytesIO()
    with matplotlib.rc_context(_CONTEXT):
        figure = _Page(arch).figure()
        figure.set_facecolor("none" if kind == "svg" else "white")
        figure.savefig(buffer, format=kind, dpi=144, metadata=undated)
    return _with_dark_colors(buffer.getvalue(), arch) if kind == "svg" else buffer.getvalue()


def _with_dark_colors(svg: bytes, arch: Arch) -> bytes:
    """Add a style sheet that recolors the drawing where the reader's scheme is dark; other viewers ignore it."""
    washes = {tint(color(slot.letter)): tint(color(slot.letter), _DARK[_EMPTY], 0.3) for slot in arch.pattern.slots}
    rules = "".join(
        f'#{_NAME} [style*="{part}: {light.lower()}"]{{{part}:{dark}!important}}'
        for light, dark in sorted({**_DARK, **washes}.items())
        for part in ("fill", "stroke")
    )
    sheet = f"@media screen and (prefers-color-scheme: dark){{{rules}}}</style>"
    return svg.replace(b"</style>", sheet.encode(), 1)


@dataclass(frozen=True)
class _Row:
    """One drawn layer: its place in the folded pattern, and the groups that hold it, outermost first."""

    leaf: Motif
    groups: tuple[Motif, ...]
    branches: tuple[tuple[Node, ...], ...]

    @property
    def height(self) -> float:
        if len(self.branches) == 1:
            return _ROW
        return max(map(len, self.branches)) * _INNER_ROW + 0.16


class _Page:
    """Lays rows out in columns, then paints them."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.rows = [
            _Row(leaf, groups, arch.layers[leaf.layers[0]])
            for part in arch.pattern.motif.parts
            for leaf, groups in _walk(part, ())
        ]
        repeated = [group for row in self.rows for group in row.groups]
        self.lanes = max((_lane(group) + 1 for group in repeated), default=0)
        self.shares = sorted({node.slot.share for node in arch.nodes if node.slot.share})
        self.columns = self._columns()
        self.pitch = _LEFT + _CARD + 0.2 + _LANE * self.lanes + 0.2 * len(self.shares) + 0.3
        self.width = max(self.pitch * len(self.columns) + 0.35, 5.4)
        self.title = textwrap.wrap(str(arch.pattern), max(20, int((self.width - 0.7) / 0.125))) or [""]
        self.top = 0.62 + 0.26 * len(self.title) + (0.2 if self.width < 8 else 0.0)
        heights = [sum(row.height + _GAP for row in column) for column in self.columns]
        heights[0] += _SLIM + _GAP
        heights[-1] += _SLIM * (1 + arch.model.final_norm)
        self.height = self.top + max(heights) + (0.75 if len(heights) > 1 else 0.6)
        self.at: dict[int, tuple[float, float, float]] = {}  # row -> left of the card, its top, its bottom

    def _columns(self) -> list[list[_Row]]:
        """Fill columns of even height, breaking before a repeated group rather than inside it where that is near."""
        total = sum(row.height + _GAP for row in self.rows)
        tallest = max(_TALLEST, math.sqrt(total * _CARD))  # deep patterns make a page, not a ribbon
        count = -(-total // tallest)
        limit = total / count + 0.6 if count > 1 else total + 1
        columns: list[list[_Row]] = [[]]
        for row in self.rows:
            filled = sum(r.height + _GAP for r in columns[-1])
            if columns[-1] and filled + row.height > limit:
                group = row.groups[0] if row.groups else None
                held = [r for r in columns[-1] if group is not None and r.groups and r.groups[0] is group]
                moved = held if len(held) <= len(columns[-1]) // 3 else []
                columns[-1] = columns[-1][: len(columns[-1]) - len(moved)]
                columns.append(list(moved))
            columns[-1].append(row)
        return columns

    def figure(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width, self.height))
        figure.set_gid(_NAME)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, self.width)
        axes.set_ylim(self.height, 0)
        axes.set_axis_off()
        self.axes = axes
        self._header()
        ends: list[tuple[float, float, float]] = []
        for index, column in enumerate(self.columns):
            ends.append(self._column(index, column))
        for (left, _, bottom), (right, top, _) in itertools.pairwise(ends):
            middle = right - 0.42
            self._line(
                [left, left, middle, middle, right, right],
                [bottom, bottom + 0.2, bottom + 0.2, top - 0.2, top - 0.2, top],
            )
        for column in self.columns:
            self._brackets(column)
            self._links(column)
        return figure

    def _header(self) -> None:
        cost = self.arch.cost()
        y = 0.36
        for line in self.title:
            self._text(0.3, y, line, 12.5, weight="bold", family="monospace")
            y += 0.26
        active = f", {human(cost.active_params)} active" if cost.active_params != cost.params else ""
        summary = [
            f"{len(self.arch.pattern)} layers, d_model {self.arch.d_model:,}",
            f"{human(cost.params)} parameters{active}, embeddings {human(cost.embedding_params)}",
        ]
        lines = summary if self.width < 8 else ["  |  ".join(summary)]
        for line in lines:
            self._text(0.3, y - 0.02, line, 8.5, color=_SOFT)
            y += 0.2
        foot = f"each layer: {self._layer_words()}    {self.arch.short}"
        self._text(0.3, self.height - 0.2, foot, 7, color=_SOFT)

    def _layer_words(self) -> str:
        """Return what a layer computes, where all layers have their norm at one place."""
        norm = self.arch.model.norm
        forms = {
            "pre": f"x + block({norm}(x))",
            "post": f"x + {norm}(block(x))",
            "sandwich": f"x + {norm}(block({norm}(x)))",
            "stream": f"n + block(n), n = {norm}(x)",
        }
        places = {node.config.norm_position for node in self.arch.nodes}
        return " or ".join(forms[place] for place in forms if place in places)

    def _column(self, index: int, column: list[_Row]) -> tuple[float, float, float]:
        """Paint one column; return the x of its stream, and where the stream enters and leaves it."""
        left = 0.3 + index * self.pitch
        stream, card = left + 0.32, left + _LEFT
        y = self.top
        start = y + 0.1
        if index == 0:
            self._slim(card, y, "embedding", f"{self.arch.vocab_size:,} tokens")
            self._line([card, stream, stream], [y + _SLIM / 2, y + _SLIM / 2, y + _SLIM])
            start = y + _SLIM / 2
            y += _SLIM + _GAP
        places = []
        for row in column:
            places.append((row, y))
            y += row.height + _GAP
        end = y
        last = index == len(self.columns) - 1
        if last:
            finish = y + (_SLIM if self.arch.model.final_norm else 0.0)
            end = finish + _SLIM / 2
        self._line([stream, stream], [start, end])
        for row, place in places:
            self._row(row, stream, card, place)
        if last:
            if self.arch.model.final_norm:
                self._text(card, y + 0.11, f"{self.arch.model.norm}", 7.5, color=_SOFT)
                self._dot(stream, y + 0.1, "")
            tied = "tied, " if self.arch.model.tie_embeddings else ""
            self._slim(card, finish, "head", f"{tied}{self.arch.vocab_size:,} tokens")
            self._arrow(stream, end, card, end)
        return stream, start, end

    def _row(self, row: _Row, stream: float, card: float, top: float) -> None:
        bottom = top + row.height
        self.at[id(row)] = (card, top, bottom)
        inward, outward = top + row.height * 0.28, top + row.height * 0.74
        self._arrow(stream, inward, card, inward)
        self._line([card, stream], [outward, outward])
        self._dot(stream, outward, "+")
        first = row.leaf.layers[0]
        label = f"{first}" if len(row.leaf.layers) == 1 else f"{first}..{row.leaf.layers[-1]}"
        self._text(stream - 0.1, inward - 0.02, label, 6.5, color=_SOFT, align="right")
        if len(row.branches) == 1:
            self._card(row.branches[0][0], card, top, _CARD, row.height)
            return
        self._box(card, top, _CARD, row.height, _EMPTY, _LINE, dashed=True)
        width = (_CARD - 0.2 - 0.16 * (len(row.branches) - 1)) / len(row.branches)
        for place, branch in enumerate(row.branches):
            x = card + 0.1 + place * (width + 0.16)
            slack = (row.height - 0.16 - len(branch) * _INNER_ROW) / 2
            for depth, node in enumerate(branch):
                y = top + 0.11 + slack + depth * _INNER_ROW
                self._card(node, x, y, width, _INNER_ROW - 0.06)
            if place:
                self._text(x - 0.08, (top + bottom) / 2, "+", 9, color=_SOFT, align="center")

    def _card(self, node: Node, x: float, y: float, width: float, height: float) -> None:
        tone = color(node.slot.letter)
        badge = min(0.36, width * 0.22)
        self._box(x, y, width, height, tint(tone), tone)
        self._box(x, y, badge, height, tone, tone)
        self._text(x + badge / 2, y + height / 2, node.slot.letter, 12, weight="bold", color="white", align="center")
        cost = self.arch.node_cost(node, 1024)
        name = BLOCKS.get(node.slot.letter).name + (f" @{node.slot.share}" if node.slot.share else "")
        counts = [human(cost.params)] + (
            [f"{human(cost.active_params)} active"] if cost.active_params != cost.params else []
        )
        start, available = x + badge + 0.09, width - badge - 0.17
        if width < 2.6:  # a branch of a parallel layer: too narrow for two columns of text
            self._text(start, y + height * 0.3, name, 8.5, weight="bold", available=available)
            both = ", ".join(counts)
            text = both if _measure(both, 7) < available / 0.8 else counts[0]
            self._text(start, y + height * 0.7, text, 7, color=_SOFT, available=available)
            return
        aside = max(_measure(text, 8) for text in counts) + 0.1
        upper, lower = y + height * 0.32, y + height * 0.7
        self._text(start, upper, name, 9.5, weight="bold", available=available - aside)
        below = available - (aside if len(counts) > 1 else 0)
        self._text(start, lower, main_sizes(node), 7.5, color=_SOFT, available=below)
        right = x + width - 0.09
        self._text(right, upper, counts[0], 8.5, align="right")
        if len(counts) > 1:
            self._text(right, lower, counts[1], 7.5, color=_SOFT, align="right")

    def _slim(self, x: float, y: float, name: str, text: str) -> None:
        self._box(x, y, _CARD, _SLIM, _PAPER, _LINE)
        self._text(x + 0.14, y + _SLIM / 2, name, 8.5, weight="bold")
        self._text(x + _CARD - 0.1, y + _SLIM / 2, text, 7.5, color=_SOFT, align="right")

    def _brackets(self, column: list[_Row]) -> None:
        """Draw one bracket for every repeated group that has rows in this column."""
        groups = {id(group): group for row in column for group in row.groups}
        for key, group in groups.items():
            places = [self.at[id(row)] for row in column if any(id(g) == key for g in row.groups)]
            x = places[0][0] + _CARD + 0.1 + 0.2 * len(self.shares) + _LANE * _lane(group)
            top, bottom = places[0][1] + 0.03, places[-1][2] - 0.03
            self._line([x, x + 0.09, x + 0.09, x], [top, top, bottom, bottom], width=1.3, tone=_SOFT)
            self._text(
                x + 0.13, (top + bottom) / 2, f"\N{MULTIPLICATION SIGN}{group.times}", 9, weight="bold", color=INK
            )

    def _links(self, column: list[_Row]) -> None:
        """Join the layers of one column that use the same module."""
        for lane, share in enumerate(self.shares):
            rows = [r for r in column if any(n.slot.share == share for branch in r.branches for n in branch)]
            if not rows:
                continue
            x = self.at[id(rows[0])][0] + _CARD + 0.12 + 0.2 * lane
            heights = [sum(self.at[id(row)][1:]) / 2 for row in rows]
            letter = next(n.slot.letter for branch in rows[0].branches for n in branch if n.slot.share == share)
            for row, y in zip(rows, heights, strict=True):
                self._line([self.at[id(row)][0] + _CARD, x], [y, y], width=1.1, tone=color(letter), dashed=True)
            self._line([x, x], [heights[0], heights[-1]], width=1.1, tone=color(letter), dashed=True)

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        color: str = INK,
        weight: str = "normal",
        align: str = "left",
        family: str | None = None,
        available: float | None = None,
    ) -> None:
        if available is not None:
            text, size = _fitted(text, size, available)
        more: dict[str, Any] = {"family": family} if family else {}
        self.axes.text(
            x, y, text, fontsize=size, color=color, fontweight=weight, ha=align, va="center_baseline", **more
        )

    def _box(self, x: float, y: float, w: float, h: float, fill: str, edge: str, *, dashed: bool = False) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.06"
        patch = FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=0.9)
        patch.set_linestyle("--" if dashed else "-")
        patch.set_zorder(2)
        self._add(patch)

    def _line(
        self, x: list[float], y: list[float], *, width: float = 1.8, tone: str = _LINE, dashed: bool = False
    ) -> None:
        from matplotlib.lines import Line2D

        style: Any = (0, (3, 2)) if dashed else "-"
        self._add(Line2D(x, y, color=tone, linewidth=width, linestyle=style, solid_joinstyle="round", zorder=1))

    def _arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        from matplotlib.patches import Polygon

        self._line([x, to_x - 0.05], [y, to_y], width=1.3)
        head = [(to_x, to_y), (to_x - 0.08, to_y - 0.035), (to_x - 0.08, to_y + 0.035)]
        self._add(Polygon(head, facecolor=_LINE, edgecolor="none", zorder=2.5))

    def _add(self, artist: Any) -> None:
        self.axes.add_artist(artist).set_clip_on(False)  # limits are set already, and looking at them again is slow

    def _dot(self, x: float, y: float, sign: str) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Circle

        self._add(Circle((x, y), 0.075, facecolor=_EMPTY, edgecolor=_LINE, linewidth=1.3, zorder=3))
        if sign:
            for dx, dy in ((0.042, 0.0), (0.0, 0.042)):
                self._add(Line2D([x - dx, x + dx], [y - dy, y + dy], color=_SOFT, linewidth=1.1, zorder=4))


def _walk(part: Motif, groups: tuple[Motif, ...]) -> Iterator[tuple[Motif, tuple[Motif, ...]]]:
    inside = (*groups, part) if part.times > 1 else groups
    if not part.parts:
        yield part, inside
    for inner in part.parts:
        yield from _walk(inner, inside)


def _lane(group: Motif) -> int:
    """Return how many repeated groups lie inside at most: the inner bracket is nearest to the cards."""
    return max((_lane(part) + (part.times > 1) for part in group.parts), default=0)


def _measure(text: str, size: float) -> float:
    """Return the width of a text, kerning left out [inches]."""
    return sum(map(_advance, text)) * size / 72


@lru_cache(maxsize=1024)
def _advance(character: str) -> float:
    """Return how far one character of the drawing's font carries the pen [font sizes]."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    prop = FontProperties(family="DejaVu Sans")
    return float(text_to_path.get_text_width_height_descent(character, prop, ismath=False)[0]) / prop.get_size()


def _fitted(text: str, size: float, available: float) -> tuple[str, float]:
    """Shrink a text to the available width, by a fifth at most, then cut it."""
    wide = _measure(text, size)
    if wide > available:
        size *= max(0.8, available / wide)
    while len(text) > 1 and _measure(text, size) > available:
        text = text[:-2].rstrip(", ") + "…"
    return text, size
