"""Confirmation: the best architectures and baselines trained again with fresh seeds, at full length.

Where many were drawn, the best get one more seed first, and those that are best with both go on: a single seed chooses
the luckiest (note: truth-set). Each is confirmed at its own best learning rate, found with the search's seed: at one
rate for all, the rate decides.
The fresh seeds choose the winner; then the winner and what it is compared with are trained with further seeds, those
of the verdict, which chose nothing. Runs lie in ``trials/NNNN/confirm/seedS/``, go on where they were stopped, and
leave the weights of none; their statistics are those of :mod:`hybridnas.analysis.confirmation` and
:mod:`hybridnas.analysis.verdict`.

Several processes share the trainings of a stage: each takes the next one that no other holds, and the command itself
then reads all results from the folders, in their order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from hybridnas.analysis.confirmation import trained_objective, turned
from hybridnas.analysis.ranking import front
from hybridnas.analysis.verdict import contenders
from hybridnas.search.rates import Tried, race
from hybridnas.search.storage.folder_store import LEASES
from hybridnas.search.training import CellTrainer, Wanted
from hybridnas.search.trial import flat, trained_tokens
from hybridnas.study.locks import FileLock
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import COMPLETE, CONFIRM, TrialRecord
from hybridnas.study.reference import ReferenceStudy
from hybridnas.train.records import final_status
from hybridnas.units import duration, several

if TYPE_CHECKING:
    from hybridnas.search.session import Session

VERDICT_SEEDS = 1000  # the verdict's seeds begin so far above the search's own: never among those that choose
SCREEN_SEED = 500  # and that of the screening so far: it is none of the fresh seeds

Field = Literal["screened", "confirmed", "verdict"]  # of a record: which seeds a result is of
Ahead = Callable[[Sequence[Wanted]], None]  # trains what is wanted in several processes; results stay in folders
Grown = TypeVar("Grown", TrialRecord, ReferenceStudy)


def best_drawn(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the eligible trials that the search drew: those on the front first, then by score."""
    best = [record for record in front(records) if record.preset is None]
    best += sorted(filter(eligible, records), key=lambda record: (score(record), record.number))
    return list({record.number: record for record in best if record.preset is None}.values())


def chosen(records: Sequence[TrialRecord], top: int, reference: str | None) -> list[TrialRecord]:
    """Return which trials are confirmed: the best ``top`` presets and drawn ones each, and the ``reference`` preset.

    Drawn ones that were screened come first, by the mean of the search's own seed and the one more.
    """
    ranked_drawn = best_drawn(records)
    screened = [record for record in ranked_drawn if record.screened]
    screened.sort(key=lambda record: (_screened_score(record), record.number))
    drawn = list({record.number: record for record in (*screened, *ranked_drawn)}.values())[:top]
    trained = [record for record in records if record.preset is not None and record.state == COMPLETE]
    ranked = sorted(trained, key=lambda record: (score(record) if eligible(record) else math.inf, record.number))
    presets = [record for record in trained if record in ranked[:top] or record.preset == reference]
    already = [record for record in records if record.confirmed]
    return list({record.number: record for record in (*presets, *drawn, *already)}.values())


def _screened_score(record: TrialRecord) -> float:
    own = record.objectives[trained_objective(record)]
    found = turned(record, {"own": own, **record.screened}).values()
    return math.fsum(math.inf if value is None else value for value in found) / len(found)


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Return seeds that the search has not used."""
    return [seed + 1 + index for index in range(count)]


def verdict_seeds(seed: int, count: int) -> list[int]:
    """Return seeds that neither the search nor the choice among the confirmed has used."""
    return fresh_seeds(seed + VERDICT_SEEDS, count)


def confirm(
    session: Session,
    records: Sequence[TrialRecord],
    save: Callable[[TrialRecord], None],
    note: Callable[[str], None],
    ahead: Ahead | None = None,
) -> None:
    """Screen, find each chosen trial's rate, train it with every fresh seed, then contenders with the verdict's seeds.

    ``save`` takes each record as it grows. What was trained before is not trained again. A run that fails leaves None:
    its architecture cannot win. ``ahead`` trains a stage in several processes, which tell how each training ended.
    """
    config, budget = session.config, session.config.budget
    known = {record.number: record for record in records}
    processes = 1 if ahead is None else config.confirmers

    def together(wanted: Sequence[Wanted]) -> bool:
        """Train in several processes where there are such; returns whether they did."""
        if ahead is None or len(wanted) < 2:
            return False
        ahead(wanted)
        return True

    def train(numbers: Sequence[int], seeds: Sequence[int], field: Field, what: str) -> None:
        missing = [(seed, n) for seed in seeds for n in numbers if str(seed) not in getattr(known[n], field)]
        if missing:
            seconds = sum(known[n].seconds for _, n in missing) / min(processes, len(missing))
            note(f"{what} {len(numbers)} architectures, {len(missing)} trainings: about {duration(seconds)}")
        told = together([Wanted(known[n].to_dict(), seed, what) for seed, n in missing])
        for seed, n in missing:
            again = train_again(session, known[n], session.folder.trial(n), seed)
            known[n] = again.added(known[n], seed, field)
            save(known[n])
            if not told:
                note(_line(what, known[n], seed, again))

    if budget.screened and len(config.objectives) == 1:
        best = best_drawn(records)[: budget.screened]
        if len(best) > budget.confirm_top:
            train([record.number for record in best], [config.seed + SCREEN_SEED], "screened", "one more seed for")
    found = [known[record.number] for record in records]
    numbers = [record.number for record in chosen(found, budget.confirm_top, session.meta.reference)]
    if budget.confirm_rates == "own":
        racing = [n for n in numbers if not known[n].own_rates and not known[n].confirmed]
        if racing:
            note(f"finding the own best learning rates of {several(len(racing), 'architecture')} at full length")
        together([Wanted(known[n].to_dict(), None, "") for n in racing])
        for n in racing:
            known[n] = at_own_rate(session, known[n], session.folder.trial(n), note)
            save(known[n])
    train(numbers, fresh_seeds(config.seed, budget.confirm_seeds), "confirmed", "confirming")
    numbers = [record.number for record in contenders(known.values(), session.meta.reference)]
    train(numbers, verdict_seeds(config.seed, budget.verdict_seeds), "verdict", "for the verdict,")


def train_ahead(session: Session, wanted: Sequence[Wanted], note: Callable[[str], None]) -> None:
    """Train, as one of several processes, what no other one holds; results stay in the folders of the runs."""
    for one in wanted:
        record, folder = one.trial, session.folder.trial(one.trial.number)
        key = "rate" if one.seed is None else f"seed{one.seed}"
        claim = FileLock(session.folder.path / LEASES / f"confirm-{record.number:04d}-{key}.lock")
        if not claim.acquire(wait=False):
            continue
        try:
            if one.seed is None:
                at_own_rate(session, record, folder, lambda text: None)  # told by the command, once
            elif not final_status(folder / CONFIRM / key):
                note(_line(one.what, record, one.seed, train_again(session, record, folder, one.seed)))
        finally:
            claim.release()


def _line(what: str, record: TrialRecord, seed: int, again: Again) -> str:
    return f"{what} trial {record.number:>3}  {record.name}  seed {seed}: {again}"


class Again(NamedTuple):
    """What an architecture reached with another seed at full length, in the first trained objective."""

    valid: float | None  # None: it failed
    test: float | None  # None where the data has no test part, too
    repeats: float | None = None  # accuracy where text repeats; None where that is not measured, too

    def __str__(self) -> str:
        if self.valid is None:
            return "failed"
        return f"{self.valid:.4f}" + ("" if self.test is None else f", test {self.test:.4f}")

    def added(self, to: Grown, seed: int, field: Field) -> Grown:
        """Return a record, or a reference study, with this result among those that screen, choose, or state."""
        found: dict[str, Any] = {field: self.valid}
        if field != "screened":
            found[f"{field}_test"] = self.test
        if field == "verdict":
            found["verdict_repeats"] = self.repeats
        grown: dict[str, Any] = {name: {**getattr(to, name), str(seed): value} for name, value in found.items()}
        return dataclasses.replace(to, **grown)


def at_own_rate(session: Session, record: TrialRecord, folder: Path, note: Callable[[str], None]) -> TrialRecord:
    """Return a record with the learning rate that is best at full length, and what was tried for it."""
    trained_at = record.lr or session.config.budget.lr
    sign = -1.0 if trained_objective(record) == "accuracy" else 1.0

    def train(lr: float) -> Tried:
        if lr == trained_at:
            return Tried(lr, sign * record.objectives[trained_objective(record)], 0)
        again, tokens = _train_again(session, record, folder, record.seed, lr)
        return Tried(lr, math.inf if again.valid is None else sign * again.valid, tokens)

    tried = race(train, trained_at)
    best = tried[0].lr
    rates = ", ".join(f"{one.lr:.4g}" for one in sorted(tried, key=lambda one: one.lr))
    note(f"trial {record.number:>3}  {record.name}: the best of the learning rates {rates} is {best:.4g}")
    return dataclasses.replace(record, own_lr=best, own_rates=[list(one) for one in tried])


def train_again(session: Session, record: TrialRecord, folder: Path, seed: int) -> Again:
    """Return what an architecture reaches with another seed at full length."""
    return _train_again(session, record, folder, seed)[0]


def _train_again(
    session: Session, record: TrialRecord, folder: Path, seed: int, lr: float | None = None
) -> tuple[Again, int]:
    """Return what an architecture reaches with another seed or rate at full length, and the tokens trained."""
    assert isinstance(session.trainer, CellTrainer), "a search on a table confirms nothing"
    result = session.trainer.again(record, folder, seed, lr)
    tokens = trained_tokens([flat(value) for value in result.evals])
    if result.status != "completed" or not result.evals:
        return Again(None, None), tokens
    last = result.evals[-1]
    if trained_objective(record) == "accuracy":
        return Again(last.accuracy, last.aux.get("test_accuracy")), tokens
    return Again(last.valid_loss, last.aux.get("test_loss"), last.aux.get("test_repeat_accuracy")), tokens
