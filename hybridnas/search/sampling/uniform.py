"""Candidates drawn evenly, and all candidates in order."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator

from hybridnas.search.history import History
from hybridnas.search.sampling.candidates import RULES, Candidates, Draw, Drawn, Parameter, Params, first_new
from hybridnas.search_spaces.enumerate import every_choice


def draw_generator(seed: int, number: int) -> random.Random:
    """Return the generator of random numbers for one draw; the same study seed and trial number give the same one."""
    return random.Random(f"{seed}:{number}")


def evenly(candidates: Candidates, chance: random.Random) -> Drawn:
    """Return choices of which each was drawn evenly from its options."""

    def ask(name: str, parameter: Parameter) -> object:
        return chance.choice(parameter.options)

    return candidates.walk(ask)


class Uniform:
    """Draws every choice evenly from its options (``sampler=random``)."""

    def __init__(self, candidates: Candidates, seed: int) -> None:
        self.candidates, self.seed = candidates, seed

    def draw(self, history: History, number: int) -> Draw | None:
        chance = draw_generator(self.seed, number)

        def own() -> Drawn:
            return evenly(self.candidates, chance)

        return first_new(self.candidates, history.known(), own, own)


class BruteForce:
    """Tries every combination of choices once, in the order of the space; passes by what breaks a rule or a limit."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self._rest: Iterator[Params] = iter(every_choice(candidates.space, candidates.scale))
        self._next: Params | None = None

    def draw(self, history: History, number: int) -> Draw | None:
        tried = {
            json.dumps(self.candidates.drawn(record.choices).params, sort_keys=True)
            for record in history.values()
            if record.preset is None
        }
        refused: Counter[str] = Counter()  # since the last one that was tried
        while True:
            if self._next is None:
                self._next = next(self._rest, None)
                if self._next is None:
                    return None
            if json.dumps(dict(self._next), sort_keys=True) in tried:
                refused.clear()
            else:
                candidate = self.candidates.of(self._next)
                why = candidate.breaks if candidate.arch is None else self.candidates.unlikely(candidate)
                if candidate.arch is None and why not in RULES and why not in self.candidates.limits:
                    why = None  # what no sizes fit is recorded with the reason: everything was to be tried
                if not why:
                    return Draw(candidate, redrawn=sum(refused.values()), refused=dict(refused))
                refused[why] += 1
            self._next = None
