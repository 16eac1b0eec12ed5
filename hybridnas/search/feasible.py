"""How much of a space keeps its rules and the limits that follow from an architecture, before anything is trained.

A few hundred even draws give the share with its interval; each is sized and counted, which takes milliseconds. Where
none of them keeps the limits, the nearest are changed choice by choice towards them, and where that leads to none
either, the search is refused with what was reached.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hybridnas.errors import ConfigError
from hybridnas.search.sampling.candidates import Candidate, Candidates
from hybridnas.search.sampling.uniform import evenly
from hybridnas.study.objectives import LIMITS, OBJECTIVES, OF_LENGTH, excess

DRAWS = 200  # even draws at most
SECONDS = 2.0  # after this much processor time no further one
STEPS = 200  # changes of the nearest candidates before a search is refused
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Share:
    """What even draws from a space came to."""

    drawn: int
    within: int  # of them, sized within rules and limits
    refused: Mapping[str, int]  # the others by the rule or limit that they broke

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share (Wilson's)."""
        n, p = self.drawn, self.within / self.drawn
        middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        why = ", ".join(f"{name} {count}" for name, count in sorted(self.refused.items()))
        return (
            f"{self.within} of {self.drawn} random architectures keep the space's rules and limits "
            f"({100 * self.within / self.drawn:.0f} %, 95 % interval {100 * low:.1f} to {100 * high:.1f} %)"
            + (f"; others break {why}" if why else "")
        )


def estimate(candidates: Candidates, seed: int, draws: int = DRAWS, seconds: float = SECONDS) -> Share:
    """Draw evenly and count; raises ConfigError where nothing that was reached keeps the limits."""
    chance = random.Random(f"feasible {seed}")
    began = time.process_time()
    found: list[Candidate] = []
    while len(found) < draws and (len(found) < 20 or time.process_time() - began < seconds):
        found.append(candidates.of(evenly(candidates, chance).params))
    within = sum(one.arch is not None for one in found)
    if within == 0 and not _reached(candidates, found, chance):
        raise _impossible(candidates, found)
    return Share(len(found), within, dict(Counter(one.breaks for one in found if one.arch is None)))


def _reached(candidates: Candidates, found: list[Candidate], chance: random.Random) -> bool:
    """Change the nearest candidates one choice at a time; whether one keeps the limits. ``found`` takes the others."""
    for _ in range(STEPS):
        near = sorted((one for one in found if one.values), key=lambda one: _excess(candidates, one))[:4]
        params = dict((chance.choice(near) if near else chance.choice(found)).params)
        if not params:
            return False
        changed = chance.choice(sorted(params))

        def ask(name: str, parameter: object, params: dict[str, object] = params, changed: str = changed) -> object:
            options = list(getattr(parameter, "options", ()))
            if name in params and params[name] in options and name != changed:
                return params[name]
            others = [option for option in options if option != params.get(name)]
            return chance.choice(others or options)

        candidate = candidates.of(candidates.walk(ask).params)
        if candidate.arch is not None:
            return True
        found.append(candidate)
    return False


def _excess(candidates: Candidates, candidate: Candidate) -> float:
    """Return by how much of the bound a candidate passes the limit that it passes most [1]."""
    over = excess(candidates.limits, candidate.values)
    return max(amount / candidates.limits[name] for name, amount in over.items())


def _impossible(candidates: Candidates, found: list[Candidate]) -> ConfigError:
    sized = [one for one in found if one.values]
    space = candidates.space.name
    if not sized:
        reason, field = Counter((one.reason, one.breaks) for one in found).most_common(1)[0][0]
        return ConfigError(
            f"space {space!r} has no architecture that keeps its rules at this size, of {len(found)} that were looked "
            f"at; most often: {reason}; change the space or the budget",
            field="budget.active_params" if field == "size" else f"space.{field}",
            got=reason,
            allowed="rules that some pattern keeps",
        )
    nearest = min(sized, key=lambda one: _excess(candidates, one))
    over = excess(candidates.limits, nearest.values)
    name = max(over, key=lambda limit: over[limit] / candidates.limits[limit])
    bound, of = candidates.limits[name], LIMITS[name]
    values = sorted(one.values[of] for one in sized)
    at = f" at {candidates.state_length:,} tokens" if name in OF_LENGTH else ""
    others = [limit for limit in over if limit != name]
    beside = f" together with {' and '.join(others)}" if others else ""
    change = "lower" if OBJECTIVES[of].maximize else "raise"
    return ConfigError(
        f"no architecture of space {space!r} keeps {name}={bound:,.6g}{at}{beside}: of {len(sized):,} that were looked "
        f"at, {of} is {values[0]:,.6g} to {values[-1]:,.6g}, and the nearest is {nearest.pattern} with "
        f"{nearest.values[of]:,.6g}; {change} the limit, or change the space or budget.depth",
        field=name,
        got=bound,
        allowed=(values[0], values[-1]),
    )
