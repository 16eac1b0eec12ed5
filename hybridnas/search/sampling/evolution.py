"""Regularised, ageing evolution (Real et al. 2019, arXiv 1802.01548) over the choices of a space.

The population is the youngest ``population`` candidates of the study: age alone ends a candidate's part in it, so a
lucky score dies out. A parent is the winner of a tournament; a child is a parent changed at one place, or two parents
crossed and then changed. Slots of a motif change along the pattern graph: one substitution, insertion, deletion or swap
(:mod:`hybridnas.arch.neighbors`); a length that the space jumps over is met by cutting or repeating the motif.

A small population and a sharp tournament, because a search has tens of candidates, not thousands: of 4 to 24 members,
8 needed the fewest tokens on the table (experiments/README.md).

Everything is read from the records, so several workers breed one population and a resumed search goes on with it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridnas.arch.neighbors import neighbors
from hybridnas.arch.pattern import Pattern, parse
from hybridnas.search.history import History
from hybridnas.search.sampling.candidates import Candidates, Draw, Drawn, Parameter, first_new
from hybridnas.search.sampling.uniform import draw_generator, evenly
from hybridnas.search_spaces.space import LetterSpace, Scale
from hybridnas.study.records import DUPLICATE

LENGTH, SLOT = "motif_length", "slot"


@dataclass(frozen=True)
class Member:
    """A candidate of the population: its choices, what they were drawn from, and its scores by training tokens."""

    number: int
    params: Mapping[str, Any]
    parameters: Mapping[str, Parameter]
    scores: Mapping[int, float]  # less is better

    def beats(self, other: Member) -> bool:
        """Whether it is better after the most training tokens that both have had; of equals, the older one is."""
        shared = self.scores.keys() & other.scores.keys()
        if not shared:
            return len(self.scores) > len(other.scores)
        mine, theirs = self.scores[max(shared)], other.scores[max(shared)]
        return mine < theirs or (mine == theirs and self.number < other.number)


class Evolution:
    """Ageing evolution over whole candidates; while the first population is drawn, choices are drawn evenly."""

    def __init__(
        self,
        candidates: Candidates,
        seed: int,
        *,
        population: int = 8,
        tournament: int = 5,
        crossover: float = 0.25,
    ) -> None:
        self.candidates, self.seed = candidates, seed
        self.population, self.tournament, self.crossover = population, tournament, crossover
        space = candidates.space
        self.motifs = Motifs(space, candidates.scale) if isinstance(space, LetterSpace) else None
        self.rng = random.Random(seed)  # of the present draw

    def draw(self, history: History, number: int) -> Draw | None:
        self.rng = draw_generator(self.seed, number)
        members = self.members(history)

        def uniform() -> Drawn:
            return evenly(self.candidates, self.rng)

        def own() -> Drawn:
            if len(members) < self.population:
                return uniform()
            child = self.child(members)
            return self.candidates.walk(lambda name, parameter: self._inherited(child, name, parameter))

        return first_new(self.candidates, history.known(), own, uniform)

    def _inherited(self, child: Mapping[str, Any], name: str, parameter: Parameter) -> Any:
        """Return a child's choice; one that it lacks, or that is not offered here, is drawn evenly."""
        if name in child and parameter.allows(child[name]):
            return child[name]
        return self.rng.choice(parameter.options)

    def members(self, history: History) -> list[Member]:
        """Return the population, oldest first: the youngest candidates that have choices and a score."""
        found: list[Member] = []
        for record in history.newest():
            if len(found) == self.population:
                break
            if record.state == DUPLICATE or record.preset is not None or not record.choices:
                continue
            scores = {rung: values[0] for rung, values in history.scored(record).items()}
            drawn = self.candidates.drawn(record.choices)
            if scores and drawn.params:
                found.append(Member(record.number, drawn.params, drawn.parameters, scores))
        return found[::-1]

    def child(self, population: Sequence[Member]) -> dict[str, Any]:
        """Return the choices of a child; some may be missing (new slots) or not be asked for (lost ones)."""
        parent = self.winner(population)
        parameters = dict(parent.parameters)
        params = dict(parent.params)
        if self.rng.random() < self.crossover:
            other = self.winner(population)
            parameters = {**other.parameters, **parameters}
            params = self.cross(params, other.params)
        return self.mutate(params, parameters)

    def winner(self, population: Sequence[Member]) -> Member:
        """Return who is left of ``tournament`` members drawn at random, each meeting the winner so far."""
        drawn = self.rng.sample(list(population), min(self.tournament, len(population)))
        best = drawn[0]
        for member in drawn[1:]:
            best = member if member.beats(best) else best
        return best

    def cross(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
        """Return one parent's choices with about half of the shared ones from the other; motifs are cut and joined."""
        child = {
            name: other[name] if name in other and not _of_motif(name) and self.rng.random() < 0.5 else value
            for name, value in one.items()
        }
        if self.motifs is not None:
            mine, theirs = self.motifs.read(one), self.motifs.read(other)
            cut = self.rng.randint(0, len(mine))
            joined = [piece if at < cut else theirs[at % len(theirs)] for at, piece in enumerate(mine)]
            child.update(self.motifs.write(joined))
        return child

    def mutate(self, params: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        """Return the choices with one of them changed; a motif counts once for each of its slots."""
        child = dict(params)
        motif = self.motifs.read(params) if self.motifs is not None else []
        genes = [name for name in child if not _of_motif(name) and len(parameters[name].options) > 1]
        places = (["motif"] * len(motif) if self.motifs and self.motifs.can_change else []) + genes
        if not places:
            return child
        place = self.rng.choice(places)
        if place == "motif":
            assert self.motifs is not None
            child.update(self.motifs.write(self.motifs.neighbor(motif, self.rng)))
        else:
            child[place] = self.step(child[place], parameters[place])
        return child

    def step(self, value: Any, parameter: Parameter) -> Any:
        """Return another value: the one before or after it on a range or among numbers, any other among names."""
        options, at = parameter.options, parameter.index(value)
        near = [i for i in (at - 1, at + 1) if 0 <= i < len(options)] if parameter.ordered else []
        return options[self.rng.choice(near or [i for i in range(len(options)) if i != at])]


class Motifs:
    """Motifs of a space of letters, as the choices spell them and as the pattern graph knows them."""

    def __init__(self, space: LetterSpace, scale: Scale) -> None:
        self.pieces = list(space.letters)
        self.lengths = space.lengths(scale)
        self.layers = {parse(piece).layers[0]: piece for piece in self.pieces}
        self.can_change = len(self.pieces) > 1 or len(self.lengths) > 1

    def read(self, params: Mapping[str, Any]) -> list[str]:
        """Return the motif's pieces; a choice that the space makes alone is not among the parameters."""
        length = params.get(LENGTH, self.lengths[0])
        return [params.get(f"{SLOT}{i}", self.pieces[0]) for i in range(length)]

    def write(self, motif: Sequence[str]) -> dict[str, Any]:
        """Return the motif as choices."""
        return {LENGTH: len(motif), **{f"{SLOT}{i}": piece for i, piece in enumerate(motif)}}

    def neighbor(self, motif: Sequence[str], rng: random.Random) -> list[str]:
        """Return a motif of an allowed length that is one move away, or as near as the lengths allow."""
        moves = neighbors(
            Pattern(tuple(parse(piece).layers[0] for piece in motif)), self.pieces, max_depth=self.lengths[-1]
        )
        kinds: dict[str, list[list[str]]] = {}
        for _, pattern in moves:
            if len(pattern.layers) in self.lengths:
                kind = "substitute" if len(pattern.layers) == len(motif) else "resize"
                kinds.setdefault(kind, []).append([self.layers[layer] for layer in pattern.layers])
        jumps = [length for length in self.lengths if abs(length - len(motif)) > 1]
        if jumps and "resize" not in kinds:  # such as 2 and 4: by cutting or repeating
            kinds["resize"] = [[motif[i % len(motif)] for i in range(length)] for length in jumps]
        # Inserting has more neighbors than all else together; the kinds are drawn as a person would weigh them.
        weights = {"substitute": 3.0, "resize": 1.0}
        kind = rng.choices(sorted(kinds), [weights[kind] for kind in sorted(kinds)])[0]
        return rng.choice(kinds[kind])


def _of_motif(name: str) -> bool:
    return name == LENGTH or (name.startswith(SLOT) and name[len(SLOT) :].isdigit())
