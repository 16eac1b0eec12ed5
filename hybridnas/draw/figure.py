"""The colors of architectures in every picture, the look of the matplotlib figures, and how these are written."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1F2933", "#9AA5B1"
WINNER = "#D1440C"  # the best that a search drew
PRESETS = {  # the baselines of the spaces that are shipped: one color each, in every picture
    "moe_mamba": "#2F6DA8",
    "mamba": "#5B8C3A",
    "mamba_mlp": "#17877E",
    "transformer": "#B9770E",
    "transformer_moe": "#7B519D",
    "qwen3_next": "#B0457B",
    "nemotron_h": "#4C5FA8",
    "jamba": "#8A6642",
}
COLORS = (
    "#C8553D",
    "#4A90B8",
    "#8A8A2B",
    "#B0457B",
    "#8A6642",
    "#4C5FA8",
    "#3F7F93",
    "#7A1F4B",
    "#6B7A2F",
)  # of others
MARKS = "osD^vP*X<>"
SETTINGS: dict[Any, Any] = {  # for matplotlib.rc_context
    "svg.hashsalt": "hybridnas",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#E4E7EB",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def preset_color(name: str) -> str:
    """Return the one color of a preset in every picture."""
    return PRESETS.get(name) or COLORS[zlib.crc32(name.encode()) % len(COLORS)]


def series_style(index: int, size: float = 5, *, name: str = "") -> dict[str, Any]:
    """Return color and mark of a series: the preset's color where its name begins with one of ``PRESETS``.

    ``size``: of the mark [points]. Two series of one preset differ by their marks.
    """
    color = PRESETS.get(name.split(",")[0], COLORS[index % len(COLORS)])
    return {"color": color, "marker": MARKS[index % len(MARKS)], "ms": size}


def save(figure: Figure, out: Path, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write a figure as ``out``.svg and ``out``.png, each whole or not at all; the same figure gives the same bytes."""
    paths = []
    for kind in kinds:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
        paths.append(out.with_suffix(f".{kind}"))
        write_atomic(paths[-1], buffer.getvalue())
    return paths
