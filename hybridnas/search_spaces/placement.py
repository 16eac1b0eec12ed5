"""Where a few slots of many lie: the named placements of a space."""

from __future__ import annotations

PLACEMENTS = ("spread", "first", "middle", "last")


def place(where: str, count: int, slots: int) -> list[int]:
    """Return ``count`` of ``slots`` positions: evenly spread inside, at the start, in the middle, or at the end.

    ``spread`` keeps equal distance to both ends (the FAIR hybrid study's advice: not first, spread in the middle).
    """
    count = min(count, slots)
    if where == "first":
        return list(range(count))
    if where == "last":
        return list(range(slots - count, slots))
    if where == "middle":
        start = (slots - count + 1) // 2
        return list(range(start, start + count))
    return [((2 * i + 1) * slots) // (2 * count) for i in range(count)]
