"""Colors of the pages: names for CSS and for charts, one for light and one for dark grounds.

A chart is drawn with the light colors, which are also those of paper; a style sheet replaces them where the reader's
scheme is dark.
"""

from __future__ import annotations

from hybridnas.draw.figure import COLORS, PRESETS, WINNER, preset_color
from hybridnas.draw.palette import tint

_PAGE = {  # name -> light, dark
    "page": ("#F7F7F5", "#16171A"),
    "card": ("#FFFFFF", "#1E2024"),
    "ink": ("#1B1C1E", "#E9E9EA"),
    "muted": ("#65676C", "#9A9CA3"),
    "grid": ("#E9E9E6", "#2D2F35"),
    "line": ("#DDDCD8", "#34363D"),
    "faint": ("#B9BCC2", "#5B5E67"),
    "good": ("#20793A", "#62C17C"),
    "bad": ("#B3261E", "#FF8A80"),
    "tint": ("#FDF1EA", "#33261E"),
    "winner": (WINNER, "#FF8A4C"),
}
WHEEL = tuple(f"c{index}" for index in range(1, len(COLORS) + 1))
SERIES = {name: preset_color(name) for name in PRESETS} | dict(zip(WHEEL, COLORS, strict=True))
LIGHT = {name: light for name, (light, _) in _PAGE.items()} | SERIES


def css() -> str:
    """Return the style sheet of the colors: variables, and what charts and drawings turn into on a dark ground."""
    dark = {name: one for name, (_, one) in _PAGE.items()} | {name: lighter(one) for name, one in SERIES.items()}
    by_color = {LIGHT[name]: dark[name] for name in LIGHT}
    rules = "".join(
        f'.chart [style*="{part}: {_rgb(light)}"]{{{part}:{to}!important}}'
        for light, to in sorted(by_color.items())
        for part in ("stroke", "fill")
    )
    return (
        f":root{{{_variables(LIGHT)}}}\n"
        f"@media screen and (prefers-color-scheme: dark){{:root{{{_variables(dark)}}}{rules}}}"
    )


def preset_key(name: str) -> str:
    """Return the name of a preset's color."""
    if name in PRESETS:
        return name
    return next(key for key in WHEEL if SERIES[key] == preset_color(name))


def lighter(color: str) -> str:
    """Return a color as it is drawn on a dark ground."""
    return tint(color, "#FFFFFF", 0.62)


def _variables(colors: dict[str, str]) -> str:
    return "".join(f"--{name}:{color};" for name, color in colors.items())


def _rgb(color: str) -> str:
    """Return a color as browsers write it into a style attribute."""
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"
