"""Several objectives: non-dominated fronts (NSGA-II), ranks, crowding, and an order within a front.

Points are tuples of equal length in which less is better.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is nowhere worse than ``b`` and somewhere better."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def fronts(points: Mapping[K, Point]) -> list[list[K]]:
    """Return the non-dominated fronts, best first; equal points share one (Deb et al. 2002, NSGA-II).

    In lexicographic order only points before a point can dominate it, so each is put into the first front that has
    none that does, found by bisection (Zhang et al. 2015, ENS-BS). With two coordinates the last point of a front
    is the only one to be asked: n log n comparisons in all. What is not a number is in the first front.
    """
    order = sorted((key for key in points if not _unknown(points[key])), key=lambda key: tuple(points[key]))
    members: list[list[Point]] = []
    front_of: dict[K, int] = {}
    for key in order:
        point = points[key]

        def free(front: list[Point], point: Point = point) -> bool:
            asked = front[-1:] if len(point) <= 2 else reversed(front)
            return not any(dominates(other, point) for other in asked)

        front_of[key] = bisect.bisect_left(members, True, key=free)
        if front_of[key] == len(members):
            members.append([])
        members[front_of[key]].append(point)
    found: list[list[K]] = [[] for _ in range(max(len(members), bool(points)))]
    for key in points:
        found[front_of.get(key, 0)].append(key)
    return found


def _unknown(point: Point) -> bool:
    return any(value != value for value in point)


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
