"""The colour of each letter and the short form of a count, the same in every picture."""

from __future__ import annotations

INK = "#1F2933"  # of words
_COLOURS = {  # told apart by people who see fewer colours, and in print by their letters
    "M": "#2F6DA8",
    "A": "#C8553D",
    "F": "#5B8C3A",
    "E": "#7B519D",
    "N": "#17877E",
    "S": "#D08A1D",
    "G": "#8A6642",
}
_MORE_COLOURS = ("#B0457B", "#4C5FA8", "#6B7A2F", "#A34A4A", "#3F7F93")


def colour(letter: str) -> str:
    """Return the one colour in which a letter is drawn everywhere."""
    return _COLOURS.get(letter, _MORE_COLOURS[ord(letter) % len(_MORE_COLOURS)])


def tint(tone: str) -> str:
    """Return a light wash of a colour, for the ground under dark words."""
    parts = (int(tone[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * 0.12):02X}" for part in parts)
