"""The shortest spelling of a sequence of layers: ``M E M E A`` becomes ``(ME)x2A``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def fold(tokens: Sequence[str]) -> str:
    """Return the shortest text with repeats that expands to ``tokens``; ties go to the first repeat found.

    Dynamic programming over spans, so that two spellings of one pattern always meet in the same text.
    """
    return _fold(tuple(tokens))


@lru_cache(maxsize=4096)
def _fold(tokens: tuple[str, ...]) -> str:
    whole = _repeated(tokens)
    if len(tokens) > 160:  # cubic work: very deep patterns fold only where one motif fills them
        return whole or "".join(tokens)
    best = [""] * (len(tokens) + 1)
    for end in range(1, len(tokens) + 1):
        candidates = [best[end - 1] + tokens[end - 1]]
        for start in range(end - 1):
            repeated = _repeated(tokens[start:end])
            if repeated:
                candidates.append(best[start] + repeated)
        best[end] = min(candidates, key=len)
    return best[-1]


@lru_cache(maxsize=65536)
def _repeated(tokens: tuple[str, ...]) -> str:
    """Spell ``tokens`` as one motif repeated, or return '' where no motif makes it shorter."""
    plain = sum(map(len, tokens))
    for period in range(1, len(tokens) // 2 + 1):
        if len(tokens) % period or tokens != tokens[:period] * (len(tokens) // period):
            continue
        motif = _fold(tokens[:period])
        spelled = f"{motif if period == 1 else f'({motif})'}x{len(tokens) // period}"
        return spelled if len(spelled) < plain else ""
    return ""
