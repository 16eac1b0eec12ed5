"""A learning rate of each candidate's own: a race to the first rung, whose winner goes on.

Rates lie on a grid of factor 3 around a start. The start and its two neighbors are trained to the first rung; as long
as the best of them is at the edge, the next rate beyond it is, too. What relatives found narrows this: candidates begin
where those with the same letters ended, and where enough of these agree, there is no race. Losers cost tokens, which
are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hybridnas.arch.pattern import parse
from hybridnas.search.history import TRAINED
from hybridnas.study.records import TrialRecord

FACTOR = 3.0  # from a rate to the next one
MOST = 6  # rates that one candidate tries
AGREEING = 3  # relatives, all with the same own rate, that make a race needless


class Tried(NamedTuple):
    """A rate, what it gave at the first rung, and what that cost."""

    lr: float
    loss: float  # validation cross-entropy [nats per token]; infinite for a run that failed
    tokens: int  # trained [count]


def start(relatives: Mapping[int, TrialRecord], record: TrialRecord, usual: float) -> tuple[float, bool]:
    """Return where a candidate's race starts, and whether its relatives agree so well that it needs none.

    Relatives are earlier trials of as many sub-layers of each letter; without any, all earlier trials; without these
    the ``usual`` rate.
    """
    letters = _letters(record)
    raced = [r for r in relatives.values() if r.lr is not None and r.number < record.number and r.state in TRAINED]
    alike = [r for r in raced if _letters(r) == letters]
    found = sorted(float(r.lr) for r in (alike or raced) if r.lr is not None)
    if not found:
        return usual, False
    agree = len(alike) >= AGREEING and len(set(found)) == 1
    return found[len(found) // 2], agree


def race(train: Callable[[float], Tried], lr: float) -> list[Tried]:
    """Return every rate tried, the best one first; ``train`` trains one to the first rung.

    The grid's first rate is ``lr``. Ties go to the lower rate. Where all fail, the lowest comes first.
    """
    tried = {step: train(lr * FACTOR**step) for step in (0, 1, -1)}
    while len(tried) < MOST:
        best = min(tried, key=lambda step: (tried[step].loss, step))
        beyond = max(tried) + 1 if best == max(tried) else min(tried) - 1 if best == min(tried) else None
        if beyond is None:
            break
        tried[beyond] = train(lr * FACTOR**beyond)
    return [tried[step] for step in sorted(tried, key=lambda step: (tried[step].loss, step))]


def rate_beyond(losses: Mapping[float, float], rates: Sequence[float], most: int = 1) -> float | None:
    """Return the next rate beyond a grid whose best one lies at an edge; None where there is none to try.

    ``losses``: of the rates tried so far; ``rates``: the grid, two or more. A step is the ratio of the two outermost
    rates, and at most ``most`` rates beyond the grid are tried. Ties go to the lower rate.
    """
    if not set(rates) <= set(losses):
        return None
    grid = sorted(rates)
    for _ in range(most):
        best = min(grid, key=lambda rate: (losses[rate], rate))
        if best not in (grid[0], grid[-1]):
            return None
        beyond = grid[0] ** 2 / grid[1] if best == grid[0] else grid[-1] ** 2 / grid[-2]
        beyond = float(f"{beyond:.3g}")
        if beyond not in losses:
            return beyond
        grid = sorted([*grid, beyond])
    return None


def losers_tokens(tried: Sequence[Tried]) -> int:
    """Return what a race cost beside the training that goes on [tokens]."""
    return sum(one.tokens for one in tried[1:])


def _letters(record: TrialRecord) -> Counter[str]:
    return Counter(slot.letter for slot in parse(record.pattern).slots)
