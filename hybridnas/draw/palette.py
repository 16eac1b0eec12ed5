"""The color of each letter, the same in every picture."""

from __future__ import annotations

INK = "#1F2933"  # of text
_COLORS = {  # distinguishable with color blindness, and in print by their letters
    "M": "#2F6DA8",
    "A": "#C8553D",
    "F": "#5B8C3A",
    "E": "#7B519D",
    "N": "#17877E",
    "S": "#D08A1D",
    "G": "#8A6642",
    "K": "#B0457B",
    "L": "#3D3D91",
    "C": "#5F6B76",
    "R": "#7A1F4B",
    "D": "#6B7A2F",
    "U": "#A34A4A",
    "W": "#3F7F93",
    "X": "#4C5FA8",
    "Y": "#9A5B13",
    "H": "#2E6B4F",
    "Z": "#8E2F2F",
}
_MORE_COLORS = ("#7A1F4B", "#4C5FA8", "#6B7A2F", "#A34A4A", "#3F7F93")


def color(letter: str) -> str:
    """Return the one color in which a letter is drawn everywhere."""
    return _COLORS.get(letter, _MORE_COLORS[ord(letter) % len(_MORE_COLORS)])


def tint(tone: str, ground: str = "#FFFFFF", share: float = 0.12) -> str:
    """Return a light wash of a color over a ground, for the ground under text."""
    mixed = (round(g + (t - g) * share) for t, g in zip(_channels(tone), _channels(ground), strict=True))
    return "#" + "".join(f"{part:02X}" for part in mixed)


def _channels(tone: str) -> tuple[int, ...]:
    return tuple(int(tone[i : i + 2], 16) for i in (1, 3, 5))
