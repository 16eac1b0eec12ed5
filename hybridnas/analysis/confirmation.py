"""Intervals over fresh seeds: architectures trained again with new seeds, compared in pairs.

A search chooses its best by the results of one seed, so that seed's results are too good for whatever was chosen; none
of them enters here. A seed decides weights and the order of the data, so two architectures trained with the same seed
are a pair, and their differences have a paired t-interval.

Which of them is best is decided on the validation part; by how much is stated on the test part, where there is one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridnas.analysis.held_out import TEST, VALID
from hybridnas.study.objectives import OBJECTIVES, TRAINED, eligible, objectives_of
from hybridnas.study.records import TrialRecord

LEVEL = 0.95  # of intervals
ENOUGH = 2  # seeds that a mean must have before it decides anything


@dataclass(frozen=True)
class Paired:
    """The difference of two architectures over the seeds that both were trained with; negative: the first is better."""

    n: int
    mean: float
    half: float | None  # half the width of the paired t interval; None with fewer than two pairs

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    def sentence(self, first: str, second: str, unit: str = "nats per token") -> str:
        """State which is better and whether that is more than noise."""
        if self.half is None:
            return f"{first} and {second} have {self.n} seeds in common: too few for an interval"
        interval = f"{self.mean:+.4f} ± {self.half:.4f} {unit} ({LEVEL:.0%} interval over {self.n} seeds)"
        if not self.clear:
            return f"the difference between {first} and {second} is inside the noise: {interval}"
        return f"{first} is {'better' if self.mean < 0 else 'worse'} than {second}: {interval}"


def paired(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> Paired:
    """Compare two architectures seed by seed (less is better); a seed that failed in either is left out."""
    gaps = [a - b for seed in first if (a := first[seed]) is not None and (b := second.get(seed)) is not None]
    if len(gaps) < 2:
        return Paired(len(gaps), statistics.fmean(gaps) if gaps else math.nan, None)
    return Paired(len(gaps), statistics.fmean(gaps), half_width(gaps))


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the t interval of a mean; of at least two values."""
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * error


@dataclass(frozen=True)
class Summary:
    """One architecture over its fresh seeds, less is better; the mean is infinite where one of them failed."""

    record: TrialRecord
    n: int
    mean: float
    error: float | None  # standard error of the mean

    @property
    def value(self) -> float | None:
        """Return the mean in the objective's own direction, None where a seed failed."""
        if not math.isfinite(self.mean):
            return None
        return -self.mean if trained_objective(self.record) == "accuracy" else self.mean


def confirmed_scores(record: TrialRecord, part: str = VALID) -> dict[str, float | None]:
    """Return a record's confirmed results on a part of the data so that less is better."""
    maximize = trained_objective(record) == "accuracy"
    values = record.confirmed_test if part == TEST else record.confirmed
    return {seed: -v if maximize and v is not None else v for seed, v in values.items()}


def confirmed_part(records: Iterable[TrialRecord]) -> str:
    """Return the part that differences are stated on: test where every confirmed result has one, else validation."""
    known = [record for record in records if record.confirmed]
    missing = any(
        value is not None and record.confirmed_test.get(seed) is None
        for record in known
        for seed, value in record.confirmed.items()
    )
    return VALID if missing or not known else TEST


def trained_objective(record: TrialRecord) -> str:
    """Return the first objective that training decides: the one that is confirmed."""
    return next((name for name in objectives_of(record) if OBJECTIVES[name].kind == TRAINED), "val_loss")


def summaries(records: Iterable[TrialRecord], part: str = VALID) -> list[Summary]:
    """Return every confirmed architecture, the best mean on a part of the data first."""
    found = []
    for record in records:
        values = list(confirmed_scores(record, part).values())
        if not values:
            continue
        good = [value for value in values if value is not None]
        mean = statistics.fmean(good) if len(good) == len(values) else math.inf
        error = statistics.stdev(good) / math.sqrt(len(good)) if len(good) == len(values) >= 2 else None
        found.append(Summary(record, len(values), mean, error))
    return sorted(found, key=lambda one: (one.mean, one.record.number))


def confirmed_winner(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the best by mean over fresh seeds; None until all that are confirmed have the same seeds, two or more."""
    found = [one for one in summaries(records) if eligible(one.record)]
    seeds = {frozenset(one.record.confirmed) for one in found}
    if len(seeds) != 1 or len(next(iter(seeds))) < ENOUGH or not math.isfinite(found[0].mean):
        return None
    return found[0].record
