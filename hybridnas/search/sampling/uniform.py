"""Candidates drawn evenly, and all candidates in order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from hybridnas.search.history import History
from hybridnas.search.sampling.candidates import Candidates, Draw, Drawn, Parameter, Params, first_new
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

    def draw(self, history: History, number: int) -> Draw:
        chance = draw_generator(self.seed, number)

        def own() -> Drawn:
            return evenly(self.candidates, chance)

        candidate, redrawn = first_new(self.candidates, history.known(), own, own)
        return Draw(candidate, redrawn=redrawn)


class BruteForce:
    """Tries every combination of choices once, in the order of the space."""

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
        while True:
            if self._next is None:
                self._next = next(self._rest, None)
                if self._next is None:
                    return None
            if json.dumps(dict(self._next), sort_keys=True) not in tried:
                return Draw(self.candidates.of(self._next))
            self._next = None
