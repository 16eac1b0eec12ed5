"""Confirmation: which of the architectures trained again with fresh seeds is best, and the figures it is decided by.

A search chooses its best by the results of one seed, so that seed's results are too good for whatever was chosen; none
of them enters here. The fresh seeds choose one of the confirmed, on the validation part; so they are too good for that
one, in their turn. By how much it is better is stated on further seeds and the test part: see verdict.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybridnas.analysis.held_out import TEST, VALID
from hybridnas.study.objectives import OBJECTIVES, TRAINED, eligible, objectives_of
from hybridnas.study.records import TrialRecord

ENOUGH = 2  # seeds that a mean must have before it decides anything


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
    """Return a record's results of the seeds that choose, on a part of the data, so that less is better."""
    return turned(record, record.confirmed_test if part == TEST else record.confirmed)


def turned(record: TrialRecord, values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return results of the objective that is confirmed so that less is better."""
    maximize = trained_objective(record) == "accuracy"
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
