"""How far behind the best is what a search hands over: the default search's way of choosing, played on a truth set.

A policy (:mod:`hybridnas.analysis.decisions`) scores all architectures alike. A search does not: it stops most at a
rung, gives the best one more seed, confirms a few with fresh seeds and hands over one. Here that is played with the
trainings of a truth set, on pools drawn from its architectures; regret is in nats per token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hybridnas.analysis.decisions import LEAST, Rows, Truth, training_flops
from hybridnas.study.truth import TruthRow

_POOL = 5 / 6  # share of the architectures that a search draws
_RATES = 2  # further rates at which what is confirmed is trained for its own best one


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A way to choose one architecture of many."""

    rungs: Sequence[float] = (0.125, 0.25, 0.5)  # shares of a whole training; scores are those of finished models
    reduction: int = 3  # one in so many goes on from a rung to the next, and at least as many as are needed at the end
    rate: float = 0.012  # of all trainings before the confirmation
    screen: int = 0  # so many of the best get one more seed; 0: none
    top: int = 1  # so many of the best are confirmed
    seeds: int = 0  # fresh seeds of each that is confirmed, at its own best rate; 0: the best is handed over as it is


@dataclass(frozen=True)
class Handed:
    """What searches of one shape hand over."""

    n: int  # architectures to draw from
    pool: int  # architectures in a search
    regret: float  # mean loss of what is handed over beyond the best of its pool [nats]
    found: float  # share of searches that hand over the best of their pool [0 to 1]
    compute_fraction: float  # mean FLOPs of a search beside what the truth of its pool cost

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dict(vars(self))


def play(
    rows: Rows, truth: Truth, shape: Shape, patterns: Iterable[str], *, draws: int = 1000, seed: int = 0
) -> Handed | None:
    """Search ``draws`` times in pools of five sixths of the architectures; those without all trainings are left out.

    The truth is that of all seeds, some of which the search looks at, too, half as long: the mean over the others alone
    would have a luckiest of its own, beside which every choice looks bad. None for fewer architectures than LEAST.
    """
    known = {pattern: found for pattern in patterns if (found := _trainings(rows, truth, shape, pattern)) is not None}
    if len(known) < LEAST:
        return None
    names = sorted(known)
    chance = random.Random(seed)
    size = math.ceil(_POOL * len(names))
    regrets, costs = [], []
    for _ in range(draws):
        pool = chance.sample(names, size)
        one, cost = _search(shape, known, pool)
        regrets.append(known[one].true - min(known[name].true for name in pool))
        costs.append(cost / sum(truth.costs[name] for name in pool))
    best = sum(regret == 0 for regret in regrets) / draws
    return Handed(len(names), size, fmean(regrets), best, fmean(costs))


@dataclass(frozen=True)
class _Trainings:
    """What a search may look at of one architecture."""

    true: float  # loss on the test part
    flops: float  # of a whole training
    first: Mapping[float, float]  # rung -> score of the search's own seed
    second: float  # score of one more seed at the last rung
    fresh: float  # mean score of fresh seeds at the own best rate, at the last rung


def _trainings(rows: Rows, truth: Truth, shape: Shape, pattern: str) -> _Trainings | None:
    """Return an architecture's trainings; None where some that the shape may ask for are missing."""
    trainings = rows.at(pattern, truth.size)
    best = {seed: row for seed, row in rows.at_best_rate(pattern, truth.size).items() if not row.failed}
    own, more = trainings.get((shape.rate, 0)), trainings.get((shape.rate, 1))
    fresh = [best[seed] for seed in range(1, 1 + shape.seeds) if seed in best]
    if not best or own is None or (shape.screen and more is None) or len(fresh) < shape.seeds:
        return None
    last = shape.rungs[-1]
    return _Trainings(
        true=truth.scores[pattern],
        flops=training_flops(own),
        first={rung: _at(own, rung) for rung in shape.rungs},
        second=math.inf if more is None else _at(more, last),
        fresh=fmean(_at(row, last) for row in fresh) if fresh else 0.0,
    )


def _at(row: TruthRow, rung: float) -> float:
    return math.inf if row.failed else row.losses[rung]


def _search(shape: Shape, known: Mapping[str, _Trainings], pool: Sequence[str]) -> tuple[str, float]:
    """Return what one search hands over, and its FLOPs."""
    last = shape.rungs[-1]
    alive, cost, before = list(pool), 0.0, 0.0
    for rung in shape.rungs:
        cost += sum(known[name].flops for name in alive) * (rung - before)
        alive.sort(key=lambda name: (known[name].first[rung], name))
        if rung != last:
            alive = alive[: max(shape.screen, shape.top, len(alive) // shape.reduction)]
            before = rung
    if shape.screen:
        alive = alive[: shape.screen]
        cost += sum(known[name].flops for name in alive) * last
        alive.sort(key=lambda name: (known[name].first[last] + known[name].second, name))
    alive = alive[: shape.top]
    if shape.seeds:
        cost += sum(known[name].flops for name in alive) * last * (shape.seeds + _RATES)
        alive.sort(key=lambda name: (known[name].fresh, name))
    return alive[0], cost
