"""Fold a sequence of layers into its shortest spelling with repeats: ``M E M E A`` becomes ``(ME)x2A``.

The result is a tree of :class:`Motif`, whose ``str`` is the spelling; drawings and tables walk the same tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

_DEEPEST = 256  # longer patterns fold only where one motif fills them: the work grows with the square


@dataclass(frozen=True)
class Motif:
    """A piece of a folded pattern: one layer (``token``) or a group (``parts``), repeated ``times``."""

    layers: tuple[int, ...]  # indices of all layers of the piece, those of every repeat included
    times: int = 1
    token: str = ""  # how the layer is spelled; "" for a group
    parts: tuple[Motif, ...] = ()  # what the group repeats

    def __str__(self) -> str:
        inner = self.token or "".join(map(str, self.parts))
        if self.times == 1:
            return inner
        return f"{inner}x{self.times}" if self.token else f"({inner})x{self.times}"

    def leaves(self) -> Iterator[Motif]:
        """Every single layer of the tree, in the order of execution."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


def fold(tokens: Sequence[str]) -> Motif:
    """Return the folding of ``tokens`` whose spelling is shortest; ties go to the first repeat found.

    The root is a group with ``times`` 1. Found by dynamic programming over spans, so that two spellings of one pattern
    always fold into the same tree.
    """
    return Motif(tuple(range(len(tokens))), parts=_motifs(tuple(tokens), (0,)))


def spell(tokens: Sequence[str]) -> str:
    """Return ``str(fold(tokens))`` without building the tree."""
    return _shortest(tuple(tokens))[0]


def _motifs(tokens: tuple[str, ...], starts: tuple[int, ...]) -> tuple[Motif, ...]:
    """Return the pieces of ``tokens``, which begin at each of the layers ``starts`` in turn."""
    found = []
    for start, period, count in _shortest(tokens)[1]:
        begins = tuple(first + start + period * turn for first in starts for turn in range(count))
        if period == 1:
            found.append(Motif(begins, count, tokens[start]))
        else:
            layers = tuple(first + offset for first in begins for offset in range(period))
            found.append(Motif(layers, count, parts=_motifs(tokens[start : start + period], begins)))
    return tuple(found)


@lru_cache(maxsize=4096)
def _shortest(tokens: tuple[str, ...]) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """Return the shortest text of ``tokens`` and its spans: first token, length of the motif, number of repeats."""
    if len(tokens) > _DEEPEST:
        period = _period(tokens)
        if period and (spelled := _repeated(tokens, 0, period, len(tokens) // period)):
            return spelled, ((0, period, len(tokens) // period),)
        return "".join(tokens), tuple((index, 1, 1) for index in range(len(tokens)))
    repeats = _repeats(tokens)
    texts = [""]
    last = [(0, 0, 0)]  # the span that ends here in the shortest text
    for end, token in enumerate(tokens, 1):
        text, span = texts[-1] + token, (end - 1, 1, 1)
        for start, period in sorted(repeats.get(end, {}).items()):
            spelled = _repeated(tokens, start, period, (end - start) // period)
            if spelled and len(texts[start]) + len(spelled) < len(text):
                text, span = texts[start] + spelled, (start, period, (end - start) // period)
        texts.append(text)
        last.append(span)
    spans = []
    end = len(tokens)
    while end:
        spans.append(last[end])
        end = last[end][0]
    return texts[-1], tuple(reversed(spans))


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


def _repeated(tokens: tuple[str, ...], start: int, period: int, count: int) -> str:
    """Spell a motif with its repeat count, or return '' where that is no shorter than writing it out."""
    motif = tokens[start : start + period]
    text = _shortest(motif)[0]
    spelled = f"{text if period == 1 else f'({text})'}x{count}"
    return spelled if len(spelled) < count * sum(map(len, motif)) else ""
