"""How things are timed side by side: interleaved rounds, medians with their spread, ratios pair by pair.

A round runs every form once, A B C A B C, so that whatever else the machine does meets all of them alike. A ratio is
taken inside each round and the ratios are summarised; two medians are never divided.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

_MOST_CALLS = 10_000  # of a form in one sample


class Form(NamedTuple):
    """One way of doing the work. ``run`` returns None, or the seconds it measured itself."""

    name: str
    run: Callable[[], float | None]
    rounds: int | None = None  # takes part in the first rounds only; none: in all
    warm: bool = True  # is run once before the first round; slow ones are not


class Spread(NamedTuple):
    """A sample in five numbers and its size."""

    median: float
    low: float
    q1: float
    q3: float
    high: float
    size: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value; quartiles are interpolated between values, as numpy does."""
        ordered = sorted(values)
        return cls(
            statistics.median(ordered), ordered[0], _quantile(ordered, 0.25), _quantile(ordered, 0.75), ordered[-1],
            len(ordered),
        )  # fmt: skip


def _quantile(ordered: list[float], part: float) -> float:
    place = part * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def measure(
    forms: Sequence[Form],
    rounds: int,
    *,
    shortest: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    settle: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Return name -> seconds of one call, a value a round; the value at index r is of round r.

    A sample repeats its form until the warm-up says that it lasts ``shortest`` seconds. ``settle`` is waited for
    before the clock is read: a GPU's queue.
    """
    calls = {form.name: _calls(form, shortest, clock, settle) for form in forms}
    times: dict[str, list[float]] = {form.name: [] for form in forms}
    for number in range(rounds):
        for form in forms:
            if form.rounds is None or number < form.rounds:
                times[form.name].append(_sample(form, calls[form.name], clock, settle))
    return times


def _calls(form: Form, shortest: float, clock: Callable[[], float], settle: Callable[[], None] | None) -> int:
    if not form.warm:
        return 1
    _sample(form, 1, clock, settle)  # the first call compiles, allocates and reads weights
    if shortest <= 0:
        return 1
    once = _sample(form, 1, clock, settle)
    return min(_MOST_CALLS, max(1, math.ceil(shortest / max(once, 1e-9))))


def _sample(form: Form, calls: int, clock: Callable[[], float], settle: Callable[[], None] | None) -> float:
    reported = 0.0
    own = False
    if settle is not None:
        settle()
    began = clock()
    for _ in range(calls):
        seconds = form.run()
        if seconds is not None:
            own, reported = True, reported + seconds
    if settle is not None:
        settle()
    return (reported if own else clock() - began) / calls


def ratios(of: Sequence[float], over: Sequence[float]) -> list[float]:
    """Return of[r] / over[r] for every round that both took part in."""
    return [a / b for a, b in zip(of, over, strict=False)]
