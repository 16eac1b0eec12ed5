"""Asynchronous successive halving with pause and resume: promotion, pausing, and which checkpoints are kept.

Every function here is pure: scores by rung and candidate go in, a decision comes out. A rung is a number of training
tokens (or any other rising integer); a score is better when it is smaller: a loss, or a rank where there are several
objectives. Nothing waits for a rung to fill (Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning",
algorithm 2): a candidate that is not yet among the best ``1/reduction`` of its rung is put aside, and is taken up from
its checkpoint as soon as later, worse arrivals have made it one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import pairwise

Scores = Mapping[int, Mapping[int, float]]  # rung -> candidate -> score; all rungs are keys, the last one too


def next_promotion(scores_by_rung: Scores, reduction: int, skip: Collection[int] = ()) -> int | None:
    """Return the candidate to train on next, from the highest rung that has one, or None.

    Every rung is a key, also where nothing has reached it yet; none is promoted from the last. ``skip``: candidates
    that count in their rungs but cannot be promoted: those that train at this moment, or have failed since.
    """
    rungs = sorted(scores_by_rung)
    for rung, above in reversed(list(pairwise(rungs))):
        for number in best_of(scores_by_rung[rung], reduction):
            if number not in scores_by_rung[above] and number not in skip:
                return number
    return None


def goes_on(scores_by_rung: Scores, reduction: int, rung: int, number: int) -> bool:
    """Whether a candidate that has just been scored at ``rung`` trains on at once; else it is paused."""
    scores = scores_by_rung[rung]
    own = (scores[number], number)
    better = sum((score, other) < own for other, score in scores.items())
    return better < len(scores) // reduction


def best_of(scores: Mapping[int, float], reduction: int) -> list[int]:
    """Return the best ``1/reduction`` of a rung, rounded down, best first; of equals the earlier candidate."""
    return ranked(scores)[: len(scores) // reduction]


def ranked(scores: Mapping[int, float]) -> list[int]:
    """Return candidates from the lowest score to the highest."""
    return sorted(scores, key=lambda number: (scores[number], number))


def may_return(scores_by_rung: Scores, reduction: int, to_come: int) -> list[int]:
    """Return the paused candidates that could still be promoted when ``to_come`` candidates will yet be drawn.

    Best chance first: at each rung, those whose rank would be among the best ``1/reduction`` even if all that may yet
    arrive there did, and were worse. No other can be promoted any more, so their checkpoints are not needed.
    """
    found: list[tuple[float, int]] = []
    for rung, above in pairwise(sorted(scores_by_rung)):
        scores = scores_by_rung[rung]
        places = (len(scores) + to_come) // reduction
        waiting = [number for number in ranked(scores)[:places] if number not in scores_by_rung[above]]
        found += [(place / places, number) for place, number in enumerate(waiting)]
        to_come += len(waiting)  # they may reach the next rung, too
    return [number for _, number in sorted(found)]
