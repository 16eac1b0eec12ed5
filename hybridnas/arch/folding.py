"""The shortest spelling of a sequence of layers: ``M E M E A`` becomes ``(ME)x2A``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

_DEEPEST = 256  # longer patterns fold only where one motif fills them: the work grows with the square


def fold(tokens: Sequence[str]) -> str:
    """Return the shortest text with repeats that expands to ``tokens``; ties go to the first repeat found.

    Dynamic programming over spans, so that two spellings of one pattern always meet in the same text.
    """
    return _fold(tuple(tokens))


@lru_cache(maxsize=4096)
def _fold(tokens: tuple[str, ...]) -> str:
    if len(tokens) > _DEEPEST:
        period = _period(tokens)
        return _spell(tokens, 0, period, len(tokens) // period) if period else "".join(tokens)
    repeats = _repeats(tokens)
    best = [""]
    for end, token in enumerate(tokens, 1):
        shortest = best[-1] + token
        for start, period in sorted(repeats.get(end, {}).items()):
            spelled = _spell(tokens, start, period, (end - start) // period)
            if spelled and len(best[start]) + len(spelled) < len(shortest):
                shortest = best[start] + spelled
        best.append(shortest)
    return best[-1]


def _repeats(tokens: tuple[str, ...]) -> dict[int, dict[int, int]]:
    """Return every span that is one motif repeated: end -> start -> length of its shortest motif."""
    size = len(tokens)
    found: dict[int, dict[int, int]] = {}
    for period in range(1, size // 2 + 1):
        same = 0  # how far tokens[start:] and tokens[start + period:] agree
        for start in range(size - period - 1, -1, -1):
            same = same + 1 if tokens[start] == tokens[start + period] else 0
            for count in range(2, same // period + 2):
                found.setdefault(start + count * period, {}).setdefault(start, period)
    return found


def _period(tokens: tuple[str, ...]) -> int:
    """Return the length of the shortest motif whose repetition is ``tokens``, 0 where there is none."""
    for period in range(1, len(tokens) // 2 + 1):
        if len(tokens) % period == 0 and tokens[period:] == tokens[:-period]:
            return period
    return 0


def _spell(tokens: tuple[str, ...], start: int, period: int, count: int) -> str:
    """Spell a motif with its repeat count, or return '' where that is no shorter than writing it out."""
    motif = tokens[start : start + period]
    text = _fold(motif)
    spelled = f"{text if period == 1 else f'({text})'}x{count}"
    return spelled if len(spelled) < count * sum(map(len, motif)) else ""
