"""The look that the project's matplotlib figures share, and how they are written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1F2933", "#9AA5B1"
COLORS = ("#2F6DA8", "#C8553D", "#5B8C3A", "#7B519D", "#17877E", "#D08A1D", "#8A6642", "#B0457B", "#4C5FA8")
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


def series_style(index: int, size: float = 5) -> dict[str, Any]:
    """Return color and mark of the series with this number; ``size``: of the mark [points]."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKS[index % len(MARKS)], "ms": size}


def save(figure: Figure, out: Path) -> list[Path]:
    """Write a figure as ``out``.svg and ``out``.png, each whole or not at all; the same figure gives the same bytes."""
    paths = []
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
        paths.append(out.with_suffix(f".{kind}"))
        write_atomic(paths[-1], buffer.getvalue())
    return paths
