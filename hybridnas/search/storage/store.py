"""Where the records of a study lie, and how its workers share them.

A store keeps one record for each trial. Of several workers, one at a time decides what comes next (:meth:`deciding`)
and begins a trial: it writes a record in state RUNNING, and holds the trial until its record is final. A trial whose
record is RUNNING and that no process holds was interrupted; any worker may take it over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from hybridnas.errors import StudyError
from hybridnas.study.records import RUNNING, TrialRecord


class TrialLostError(StudyError):
    """Another worker has taken over the trial, because this one was silent for too long."""


@dataclass(frozen=True)
class Held:
    """A trial that is being trained, or was when its process ended; then ``where`` is empty."""

    record: TrialRecord
    where: str  # worker, process and host


class RecordStore(Protocol):
    """What a search needs of the place where records lie."""

    def deciding(self) -> AbstractContextManager[None]:
        """Hold the right to decide: one worker at a time looks at what there is to do and takes some of it."""
        ...

    def changes(self) -> list[TrialRecord]:
        """Return the records that are new or have changed since the last call, by number; at first all of them."""
        ...

    def next_number(self) -> int:
        """Return the number of the next new trial."""
        ...

    def begin(self, record: TrialRecord) -> bool:
        """Hold a trial and write its record in state RUNNING; False, and nothing written, where another was faster."""
        ...

    def save(self, record: TrialRecord) -> None:
        """Write a record. Raises TrialLostError where another worker has taken over a trial that was held here."""
        ...

    def release(self, number: int) -> None:
        """Let go of a trial."""
        ...

    def orphans(self) -> list[int]:
        """Return the trials whose record is RUNNING and that no living worker holds."""
        ...

    def running(self) -> list[Held]:
        """Return the trials whose record is RUNNING, and where they are trained."""
        ...

    def close(self) -> None:
        """Let go of everything; trials that were not finished can be taken over at once."""
        ...


class MemoryStore:
    """Records in memory, for searches that are simulated; one worker."""

    def __init__(self) -> None:
        self.records: dict[int, TrialRecord] = {}
        self._new: dict[int, TrialRecord] = {}
        self._held: set[int] = set()

    @contextmanager
    def deciding(self) -> Iterator[None]:
        yield

    def changes(self) -> list[TrialRecord]:
        found = [self._new[number] for number in sorted(self._new)]
        self._new = {}
        return found

    def next_number(self) -> int:
        return len(self.records)

    def begin(self, record: TrialRecord) -> bool:
        self._held.add(record.number)
        self.save(record)
        return True

    def save(self, record: TrialRecord) -> None:
        self.records[record.number] = self._new[record.number] = record

    def release(self, number: int) -> None:
        self._held.discard(number)

    def orphans(self) -> list[int]:
        return [n for n, record in self.records.items() if record.state == RUNNING and n not in self._held]

    def running(self) -> list[Held]:
        return [
            Held(record, "this process" if n in self._held else "")
            for n, record in self.records.items()
            if record.state == RUNNING
        ]

    def close(self) -> None:
        self._held, self._new = set(), dict(self.records)  # the next loop reads all of them
