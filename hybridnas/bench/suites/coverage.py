"""How often a study's intervals hold the truth and its claims are false, on simulated studies whose truth is known.

A simulated study goes the way of a real one: a search with one seed chooses, fresh seeds choose among the best, further
seeds state the differences by the code that a report uses. What an architecture loses on a document is its true loss,
plus what the seed does to it, plus what the document does to it, plus noise of both together. Seed and documents move
the validation and the test loss alike, as in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridnas.analysis import effects
from hybridnas.analysis.bootstrap import difference
from hybridnas.analysis.confirmation import confirmed_scores, confirmed_winner
from hybridnas.analysis.held_out import TEST
from hybridnas.analysis.ranking import preset_record, winner
from hybridnas.analysis.verdict import contenders, over_documents, verdict
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread
from hybridnas.bench.result import Result, Table
from hybridnas.search.confirm import chosen, fresh_seeds, verdict_seeds
from hybridnas.study.documents import DocumentSums
from hybridnas.study.records import COMPLETE, TrialRecord

REFERENCE = "moe_mamba"
PRESETS = (REFERENCE, "mamba", "mamba_mlp", "transformer", "transformer_moe")
BOUNDS = (0.93, 0.97)  # goal of the coverage of 95 % intervals
_ROOM = 2  # standard errors of the simulation that false claims may lie above alpha
_LETTERS = "MAFE"

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class World:
    """What simulated studies are like; standard deviations of a loss [nats per token]."""

    name: str
    effects: float = 0.0  # of the architectures' true losses
    seeds: float = 0.02
    documents: float = 0.018  # of a document, by architecture
    both: float = 0.02  # of seed and document together
    n_documents: int = 31
    drawn: int = 15
    confirm_seeds: int = 3
    verdict_seeds: int = 4
    uneven: bool = False  # the noise of seeds differs by up to four times between architectures
    skewed: bool = False  # exponential noise of seeds instead of normal
    alpha: float = 0.05


WORLDS = (
    World(name="no difference"),
    World(name="differences", effects=0.02),
    World(name="small differences", effects=0.005),
    World(name="no difference, uneven noise", uneven=True),
    World(name="no difference, skewed noise", skewed=True),
    World(name="no difference, documents matter most", documents=0.1, seeds=0.005),
    World(name="no difference, ten seeds", confirm_seeds=10, verdict_seeds=10),
    World(name="no difference, alpha 0.01", alpha=0.01),
)


class Outcome(NamedTuple):
    """What one simulated study said of the winner and the reference preset, and whether it was true."""

    covers: bool | None  # whether the verdict's interval holds the true difference; None: the reference won
    wide: float  # half its width [nats per token]
    beats: bool  # whether the winner is said to beat the reference
    false: bool  # whether any comparison claims a difference in a direction that is not the true one
    same_covers: bool | None  # the same of the fresh seeds that chose the winner, which a verdict leaves aside
    same_beats: bool
    naive_covers: bool | None  # of percentiles of a bootstrap over the verdict's seeds and documents
    one_covers: bool | None  # of the interval over documents with the search's one seed, given that seed


def run(config: BenchConfig) -> Result:
    """Simulate studies of every kind, and regressions of letters; state coverage and false claims."""
    result = Result("coverage")
    studies = config.repeats or config.pick(2000, 200, 4)
    rows = []
    for number, world in enumerate(WORLDS):
        found = [simulate(world, seed=100_000 * number + study) for study in range(studies)]
        row = _summary(world, found)
        rows.append(row)
        if world.alpha == 0.05:
            _hold(result, f"{world.name}: 95 % intervals of the verdict that hold the truth", row["coverage"])
        if not world.effects:
            bound = world.alpha + _ROOM * math.sqrt(world.alpha * (1 - world.alpha) / studies)
            spread = Spread.of([row["false_claims"]])
            result.hold("at most", bound, spread, what=f"{world.name}: studies with a false claim", against="alpha")
    columns = tuple(rows[0])
    title = f"coverage: {studies:,} simulated studies of each kind"
    result.tables.append(Table(title, columns, [[_short(row[name]) for name in columns] for row in rows]))
    shares = [effects_coverage(design, studies // 2, seed=7) for design in DESIGNS]
    for share in shares:
        _hold(result, f"effects, {share['architectures']}: 95 % intervals that hold the truth", share["positions"])
    columns = tuple(shares[0])
    title = "coverage of the effects of letters: jackknife over architectures, beside percentiles of a bootstrap"
    result.tables.append(Table(title, columns, [[_short(row[name]) for name in columns] for row in shares]))
    result.facts |= {"studies": studies, "worlds": rows, "effects": shares}
    return result


def _hold(result: Result, what: str, coverage: float) -> None:
    for rule, bound in zip(("at least", "at most"), BOUNDS, strict=True):
        result.hold(rule, bound, Spread.of([coverage]), what=what, against="95 %")


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _summary(world: World, found: Sequence[Outcome]) -> dict[str, Any]:
    """Return the shares of one kind of study; coverage is over the studies whose winner is not the reference."""
    covers = [one.covers for one in found if one.covers is not None]
    coverage = _share(covers)
    return {
        "studies": world.name,
        "coverage": coverage,
        "standard_error": math.sqrt(coverage * (1 - coverage) / max(1, len(covers))),
        "half_width": float(np.mean([one.wide for one in found if one.covers is not None])),
        "says_beats": _share([one.beats for one in found]),
        "false_claims": _share([one.false for one in found]),
        "coverage_of_choosing_seeds": _share([one.same_covers for one in found if one.same_covers is not None]),
        "beats_by_choosing_seeds": _share([one.same_beats for one in found]),
        "coverage_of_percentiles": _share([one.naive_covers for one in found if one.naive_covers is not None]),
        "coverage_one_seed": _share([one.one_covers for one in found if one.one_covers is not None]),
    }


def _share(values: Sequence[bool]) -> float:
    return float(np.mean(values)) if values else math.nan


def simulate(world: World, *, seed: int) -> Outcome:
    """Run one study from its search to its verdict, and hold what it says against the truth."""
    rng = np.random.default_rng(seed)
    count = len(PRESETS) + world.drawn
    nature = _Nature(world, rng, count)
    own = 0
    records = [
        TrialRecord(
            number=n, state=COMPLETE, pattern=f"M{n}", fingerprint=str(n), seed=own,
            preset=PRESETS[n] if n < len(PRESETS) else None, valid_loss=nature.valid(n, own),
            objectives={"val_loss": nature.valid(n, own)}, test_loss=nature.test(n, own),
        )
        for n in range(count)
    ]  # fmt: skip
    one = over_documents(records, REFERENCE, nature.sums, alpha=world.alpha)
    one_best = winner(records)
    one_covers = None
    if one is not None and one_best is not None and one.half is not None:
        true = nature.loss(one_best.number, own) - nature.loss(0, own)
        one_covers = abs(one.mean - true) <= one.half
    for n in [record.number for record in chosen(records, 3, REFERENCE)]:
        records[n] = nature.again(records[n], "confirmed", fresh_seeds(own, world.confirm_seeds))
    for n in [record.number for record in contenders(records, REFERENCE)]:
        records[n] = nature.again(records[n], "verdict", verdict_seeds(own, world.verdict_seeds))
    said = verdict(records, REFERENCE, documents=nature.sums, alpha=world.alpha)
    best, reference = confirmed_winner(records), preset_record(records, REFERENCE)
    assert said is not None
    assert best is not None
    assert reference is not None
    true_of = {other.record.number: float(nature.true[best.number] - nature.true[other.record.number])
               for other in said.others}  # fmt: skip
    false = any(
        other.claimed(world.alpha) and other.gap.mean * true_of[other.record.number] <= 0 for other in said.others
    )
    if best.number == reference.number:
        return Outcome(None, math.nan, False, false, None, False, None, one_covers)
    other = next(other for other in said.others if other.record.number == reference.number)
    true, gap = true_of[reference.number], other.gap
    assert gap.half is not None
    same = difference(confirmed_scores(best, TEST), confirmed_scores(reference, TEST), alpha=world.alpha)
    assert same.half is not None
    return Outcome(
        covers=abs(gap.mean - true) <= gap.half,
        wide=gap.half,
        beats=other.claimed(world.alpha) and gap.mean < 0,
        false=false,
        same_covers=abs(same.mean - true) <= same.half,
        same_beats=same.clear and same.mean < 0,
        naive_covers=nature.percentiles_hold(best, reference, true, rng),
        one_covers=one_covers,
    )


class _Nature:
    """The truth of one study, and what training and measuring find of it."""

    def __init__(self, world: World, rng: np.random.Generator, count: int) -> None:
        self.world, self.rng = world, rng
        self.true: F64 = 1.5 + world.effects * rng.normal(size=count)
        self.places = np.maximum(200, rng.lognormal(7, 0.8, world.n_documents)).astype(int)
        self._noise: F64 = world.seeds * (2 ** rng.uniform(-1, 1, count) if world.uneven else np.ones(count))
        self._of_document = world.documents * rng.normal(size=(count, 2, world.n_documents))  # validation, test
        self._runs: dict[tuple[int, int], tuple[float, F64]] = {}

    def _run(self, number: int, seed: int) -> tuple[float, F64]:
        """Return what a seed does to an architecture, and its losses on the documents of both parts (2, D)."""
        if (number, seed) not in self._runs:
            draw = self.rng.exponential() - 1 if self.world.skewed else self.rng.normal()
            shift = float(self._noise[number] * draw)
            both = self.world.both * self.rng.normal(size=(2, self.world.n_documents))
            losses = self.true[number] + shift + self._of_document[number] + both
            self._runs[number, seed] = shift, losses
        return self._runs[number, seed]

    def loss(self, number: int, seed: int) -> float:
        """Return what an architecture trained with a seed loses on all documents there could be."""
        return float(self.true[number]) + self._run(number, seed)[0]

    def valid(self, number: int, seed: int) -> float:
        return float(self._run(number, seed)[1][0] @ self.places / self.places.sum())

    def test(self, number: int, seed: int) -> float:
        return float(self._run(number, seed)[1][1] @ self.places / self.places.sum())

    def sums(self, study: str | None, number: int, seed: str | None) -> DocumentSums:
        losses = self._run(number, int(seed or 0))[1][1]
        places = tuple(self.places.tolist())
        return DocumentSums(tuple(range(len(places))), tuple(losses * self.places), places, places)

    def again(self, record: TrialRecord, field: str, seeds: Sequence[int]) -> TrialRecord:
        n = record.number
        found: dict[str, Any] = {
            field: {str(seed): self.valid(n, seed) for seed in seeds},
            f"{field}_test": {str(seed): self.test(n, seed) for seed in seeds},
        }
        return dataclasses.replace(record, **found)

    def percentiles_hold(self, best: TrialRecord, other: TrialRecord, true: float, rng: np.random.Generator) -> bool:
        """Whether the interval of a plain bootstrap over seeds and documents holds the truth."""
        gaps_SD = np.array(
            [self._run(best.number, int(s))[1][1] - self._run(other.number, int(s))[1][1] for s in best.verdict]
        )
        seeds, documents = gaps_SD.shape
        times_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), 400) / seeds
        times_RD = rng.multinomial(documents, np.full(documents, 1 / documents), 400) * self.places
        means = np.einsum("rs,sd,rd->r", times_RS, gaps_SD, times_RD / times_RD.sum(axis=1, keepdims=True))
        low, high = np.quantile(means, [self.world.alpha / 2, 1 - self.world.alpha / 2])
        return bool(low <= true <= high)


class Design(NamedTuple):
    """Architectures whose letters' effects are estimated."""

    architectures: int
    depth: int
    letters: int
    skewed: bool  # a sampler that prefers some letters at each position


DESIGNS = (Design(40, 4, 4, False), Design(40, 4, 4, True), Design(100, 4, 4, True), Design(60, 8, 3, True))


def effects_coverage(design: Design, studies: int, *, seed: int) -> dict[str, Any]:
    """Return how often the intervals of letters' effects hold the truth, over all letters and positions."""
    rng = np.random.default_rng(seed)
    known = _LETTERS[: design.letters]
    hits: dict[str, list[bool]] = {"positions": [], "letters": [], "percentiles": []}
    for _ in range(studies):
        of_letter = 0.03 * rng.normal(size=design.letters)
        true = {letter: of_letter[i] - float(np.delete(of_letter, i).mean()) for i, letter in enumerate(known)}
        even = np.full(design.letters, 1 / design.letters)
        odds = [rng.dirichlet(np.full(design.letters, 3.0)) if design.skewed else even for _ in range(design.depth)]
        index = np.column_stack([rng.choice(design.letters, design.architectures, p=p) for p in odds])
        losses = of_letter[index].sum(axis=1) + 0.04 * rng.normal(size=design.architectures)
        records = [
            TrialRecord(number=n, state=COMPLETE, pattern="".join(known[i] for i in row)) for n, row in enumerate(index)
        ]
        scores = dict(enumerate(losses.tolist()))
        for kind, find in (("positions", effects.position_effects), ("letters", effects.letter_effects)):
            hits[kind] += [abs(one.mean - true[one.letter]) <= one.half for one in find(records, scores)]
        hits["percentiles"] += _percentiles(records, losses, effects.letter_effects, true, rng)
    return {
        "architectures": f"{design.architectures} of depth {design.depth}, {design.letters} letters"
        + (", drawn unevenly" if design.skewed else ""),
        "studies": studies,
        "positions": _share(hits["positions"]),
        "letters": _share(hits["letters"]),
        "letters_by_percentiles": _share(hits["percentiles"]),
    }


def _percentiles(
    records: Sequence[TrialRecord],
    losses: F64,
    find: Callable[..., list[effects.Effect]],
    true: dict[str, float],
    rng: np.random.Generator,
) -> list[bool]:
    """Return whether the percentiles of a bootstrap over architectures hold the truth, for each letter."""
    letters = [effects.letters_of(record.pattern) for record in records]
    known = sorted(true)
    counts = np.array([[1.0, *(own.count(letter) for letter in known)] for own in letters])
    contrast = np.array([[0.0, *(1.0 if a == b else -1 / (len(known) - 1) for b in known)] for a in known])
    means = []
    for _ in range(200):
        picked = rng.integers(0, len(records), len(records))
        means.append(contrast @ (np.linalg.pinv(counts[picked]) @ losses[picked]))
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return [bool(low[i] <= true[letter] <= high[i]) for i, letter in enumerate(known)]
