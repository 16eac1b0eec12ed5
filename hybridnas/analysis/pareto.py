"""Several objectives: non-dominated fronts (NSGA-II), ranks, crowding, and an order within a front.

Points are tuples of equal length in which less is better.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def fronts(points: Mapping[K, Point]) -> list[list[K]]:
    """Return the non-dominated fronts, best first; equal points share one (Deb et al. 2002, NSGA-II)."""
    left = dict(points)
    found = []
    while left:
        front = [key for key, point in left.items() if not any(dominates(other, point) for other in left.values())]
        found.append(front)
        for key in front:
            del left[key]
    return found


def staircase(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right, equal ones once."""
    known = dict(enumerate(points))
    return sorted({known[key] for key in next(iter(fronts(known)), [])})


def scores(points: Mapping[K, Point]) -> dict[K, float]:
    """Return one number for each point, less is better: its front's rank, and below one, how crowded it lies there.

    So the order that successive halving needs is that of NSGA-II. Of equals, the one that comes first is better.
    """
    found: dict[K, float] = {}
    for rank, front in enumerate(fronts(points)):
        distance = crowding({key: points[key] for key in front})
        for place, key in enumerate(sorted(front, key=lambda key: -distance[key])):
            found[key] = rank + place / (len(front) + 1)
    return {key: found[key] for key in points}


def crowding(points: Mapping[K, Point]) -> dict[K, float]:
    """Return how far apart each point's neighbors are, summed over the objectives; infinite at the ends."""
    found = dict.fromkeys(points, 0.0)
    for axis in range(len(next(iter(points.values()), ()))):
        line = sorted(points, key=lambda key: points[key][axis])
        span = points[line[-1]][axis] - points[line[0]][axis]
        found[line[0]] = found[line[-1]] = math.inf
        for before, key, after in zip(line, line[1:], line[2:], strict=False):
            found[key] += (points[after][axis] - points[before][axis]) / span if span else 0.0
    return found
