"""Loss curves and a search's progress: tokens to reach a loss, and the best so far over the tokens trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import DUPLICATE, TrialRecord


def tokens_to_reach(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return the tokens at which a curve first comes down to ``loss``, straight lines between its points.

    None where it never does; the first point's tokens where it is there from the start.
    """
    before: tuple[float, float] | None = None
    for tokens, value in points:
        if value <= loss:
            if before is None or value == loss:
                return tokens
            return before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - value)
        before = (tokens, value)
    return None


def course(records: Iterable[TrialRecord]) -> list[tuple[float, float | None, TrialRecord]]:
    """Return what a search trained, in time: (tokens trained by then, score of a full trial or None, its record).

    Less is better. Presets are left out, with their tokens: every study begins with the same ones.
    """
    events: list[tuple[float, float, float | None, TrialRecord]] = []
    for record in records:
        if record.state == DUPLICATE or record.preset is not None:
            continue
        last = score(record) if eligible(record) else None
        for place, (when, tokens) in enumerate(record.legs):
            events.append((when, tokens, last if place == len(record.legs) - 1 else None, record))
    found: list[tuple[float, float | None, TrialRecord]] = []
    trained = 0.0
    for _, tokens, value, record in sorted(events, key=lambda event: event[0]):
        trained += tokens
        found.append((trained, value, record))
    return found


def best_so_far(records: Iterable[TrialRecord]) -> list[tuple[float, float]]:
    """Return the incumbents of a search: (tokens trained by then, best score of a full trial, less is better)."""
    found: list[tuple[float, float]] = []
    for trained, value, _ in course(records):
        if value is not None and (not found or value < found[-1][1]):
            found.append((trained, value))
    return found
