"""The records of a study as a search decides by them: counted, ranked at rungs and found by architecture.

Everything is kept up to date record by record, so that a decision costs no walk over all trials.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hybridnas.analysis import pareto
from hybridnas.study.objectives import of_eval, point
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, RUNNING, TrialRecord

TRAINED = (COMPLETE, PRUNED, FAIL)  # the states that count as a finished trial


class History(Mapping[int, TrialRecord]):
    """Records by number; :meth:`put` adds one or takes its new version."""

    def __init__(self, objectives: Sequence[str], rungs: Sequence[int]) -> None:
        self.objectives = tuple(objectives)
        self.rungs = tuple(rungs)
        self.finished = 0  # trials that count towards n_trials
        self.running: set[int] = set()  # of them, those that train now, or did when their process ended
        self.trained_tokens = 0
        self._records: dict[int, TrialRecord] = {}
        self._numbers: list[int] = []  # rising
        self._points: dict[int, dict[int, tuple[float, ...]]] = {rung: {} for rung in self.rungs}
        self._scores: dict[int, dict[int, float]] = {rung: {} for rung in self.rungs}
        self._stale = False
        self._by_key: dict[str, dict[int, TrialRecord]] = {}

    def __getitem__(self, number: int) -> TrialRecord:
        return self._records[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._records)

    def ordered(self) -> list[TrialRecord]:
        """Return all records by number."""
        return [self._records[number] for number in self._numbers]

    def newest(self) -> Iterator[TrialRecord]:
        """Yield the records from the highest number to the lowest."""
        return (self._records[number] for number in reversed(self._numbers))

    def put(self, record: TrialRecord) -> bool:
        """Take a record, new or changed; returns whether anything is new."""
        number = record.number
        old = self._records.get(number)
        if old == record:
            return False
        if old is None:
            bisect.insort(self._numbers, number)
        else:
            self._count(old, -1)
        self._records[number] = record
        self._count(record, 1)
        self.running.discard(number)
        if record.state == RUNNING:
            self.running.add(number)
        self._place(record)
        return True

    def trailing_duplicates(self) -> int:
        """Return how many of the latest candidates had all been tried before: many mean that the space is used up."""
        count = 0
        for record in self.newest():
            if record.state not in (DUPLICATE, INFEASIBLE):
                break
            count += record.state == DUPLICATE
        return count

    def _count(self, record: TrialRecord, sign: int) -> None:
        self.finished += sign * (record.state in TRAINED or paused_once(record))
        if record.state != DUPLICATE:
            tokens = sum(tokens for _, tokens in record.legs) if record.legs else record.tokens
            self.trained_tokens += sign * round(tokens)
        key = key_of(record)
        if key is not None:
            same = self._by_key.setdefault(key, {})
            if sign > 0:
                same[record.number] = record
            else:
                same.pop(record.number, None)
                if not same:
                    del self._by_key[key]

    def _place(self, record: TrialRecord) -> None:
        points = self.scored(record)
        for rung, found in self._points.items():
            found.pop(record.number, None)
            self._scores[rung].pop(record.number, None)
            if rung in points:
                found[record.number] = points[rung]
                if len(self.objectives) == 1:
                    self._scores[rung][record.number] = points[rung][0]
        self._stale = len(self.objectives) > 1

    def scored(self, record: TrialRecord) -> dict[int, tuple[float, ...]]:
        """Return a candidate's objectives at the rungs that it has reached, turned so that less is better."""
        if record.state not in (COMPLETE, PRUNED) and not paused_once(record):
            return {}
        found = {}
        for tokens, entry in entries_at(record, self.rungs).items():
            values = of_eval(self.objectives, record.objectives, entry)
            if len(values) == len(self.objectives):
                found[tokens] = point(values)
        return found

    @property
    def scores(self) -> Mapping[int, Mapping[int, float]]:
        """Rung -> candidate -> score, less is better: the objective, or the rank where there are several."""
        if self._stale:
            self._scores = {rung: _ranks(found) for rung, found in self._points.items()}
            self._stale = False
        return self._scores

    def scores_with(self, rung: int, number: int, values: Mapping[str, float]) -> dict[int, float]:
        """Return the scores at a rung, as they are once a candidate has these objectives there."""
        mine = point(values)
        if len(self.objectives) == 1:
            return {**self._scores[rung], number: mine[0]}
        return _ranks({**self._points[rung], number: mine})

    def known(self) -> Mapping[str, Mapping[int, TrialRecord]]:
        """Return what was tried, by architecture; infeasible candidates by their choices."""
        return self._by_key

    def same(self, key: str, number: int) -> TrialRecord | None:
        """Return an earlier trial of the same architecture: the first one that was trained, else one that trains."""
        found = [record for n, record in sorted(self._by_key.get(key, {}).items()) if n != number]
        trained = [record for record in found if record.state in TRAINED or paused_once(record)]
        training = [record for record in found if record.state == RUNNING]
        return next(iter(trained or training), None)


def paused_once(record: TrialRecord) -> bool:
    """Whether a trial that trains now was paused before, so that its record already has results."""
    return record.state == RUNNING and bool(record.rungs)


def key_of(record: TrialRecord) -> str | None:
    """Return what identifies a candidate: its architecture's fingerprint, else the choices of an infeasible one."""
    if record.fingerprint:
        return record.fingerprint
    if record.preset is None and record.choices:
        return f"infeasible {json.dumps(dict(record.choices), sort_keys=True)}"
    return None


def entries_at(record: TrialRecord, rungs: Sequence[int]) -> dict[int, Mapping[str, Any]]:
    """Return the evaluations that a record has at these training tokens."""
    curve: Sequence[Mapping[str, Any]] = record.curve or [
        {"tokens": tokens, "valid_loss": loss} for tokens, loss in record.rungs
    ]
    return {int(entry["tokens"]): entry for entry in curve if entry.get("tokens") in rungs}


def _ranks(points: Mapping[int, tuple[float, ...]]) -> dict[int, float]:
    return pareto.scores(dict(sorted(points.items())))
