"""Confirmation: the best architectures and the presets trained again with fresh seeds, at full length.

Runs lie in ``trials/NNNN/confirm/seedS/``, go on where they were stopped, and leave the weights of none; their
statistics are those of :mod:`hybridnas.analysis.confirmation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hybridnas.analysis.confirmation import trained_objective
from hybridnas.analysis.ranking import front
from hybridnas.search.training import CellTrainer
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import COMPLETE, TrialRecord
from hybridnas.study.reference import ReferenceStudy

if TYPE_CHECKING:
    from hybridnas.search.session import Session

Grown = TypeVar("Grown", TrialRecord, ReferenceStudy)


def chosen(records: Sequence[TrialRecord], top: int) -> list[TrialRecord]:
    """Return which trials are confirmed: the best ``top`` that were drawn, and every preset trained to the end."""
    best = [record for record in front(records) if record.preset is None]
    best += sorted(filter(eligible, records), key=lambda record: (score(record), record.number))
    drawn = list({record.number: record for record in best if record.preset is None}.values())[:top]
    presets = [record for record in records if record.preset is not None and record.state == COMPLETE]
    already = [record for record in records if record.confirmed]
    return list({record.number: record for record in (*presets, *drawn, *already)}.values())


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Return seeds that the search has not used."""
    return [seed + 1 + index for index in range(count)]


def confirm(
    session: Session,
    records: Sequence[TrialRecord],
    save: Callable[[TrialRecord], None],
    note: Callable[[str], None],
) -> None:
    """Train the chosen trials with every fresh seed, seed by seed; ``save`` takes each record as it grows.

    What was trained before is not trained again. A run that fails leaves None: its architecture cannot win.
    """
    budget = session.config.budget
    grown = {record.number: record for record in chosen(records, budget.confirm_top)}
    seeds = fresh_seeds(session.config.seed, budget.confirm_seeds)
    missing = [record.seconds for record in grown.values() for seed in seeds if str(seed) not in record.confirmed]
    if missing:
        note(f"confirming {len(grown)} architectures, {len(missing)} trainings: {_about(sum(missing))}")
    for seed in seeds:
        for number, record in grown.items():
            if str(seed) in record.confirmed:
                continue
            again = train_again(session, record, session.folder.trial(number), seed)
            grown[number] = again.added(record, seed)
            save(grown[number])
            note(f"confirming trial {number:>3}  {record.name}  seed {seed}: {again}")


def _about(seconds: float) -> str:
    return f"about {math.ceil(seconds / 60)} min" if seconds >= 60 else "under a minute"


class Again(NamedTuple):
    """What an architecture reached with another seed at full length, in the first trained objective; None: it failed.

    Validation says which of the confirmed is best, test by how much: what chose is too good to be stated.
    """

    valid: float | None
    test: float | None  # None where the data has no test part, too

    def __str__(self) -> str:
        if self.valid is None:
            return "failed"
        return f"{self.valid:.4f}" + ("" if self.test is None else f", test {self.test:.4f}")

    def added(self, to: Grown, seed: int) -> Grown:
        """Return a record, or a reference study, with this result."""
        confirmed = {**to.confirmed, str(seed): self.valid}
        return dataclasses.replace(to, confirmed=confirmed, confirmed_test={**to.confirmed_test, str(seed): self.test})


def train_again(session: Session, record: TrialRecord, folder: Path, seed: int) -> Again:
    """Return what an architecture reaches with another seed at full length."""
    assert isinstance(session.trainer, CellTrainer), "a search on a table confirms nothing"
    result = session.trainer.again(record, folder, seed)
    if result.status != "completed" or not result.evals:
        return Again(None, None)
    last = result.evals[-1]
    if trained_objective(record) == "accuracy":
        return Again(last.accuracy, last.aux.get("test_accuracy"))
    return Again(last.valid_loss, last.aux.get("test_loss"))
