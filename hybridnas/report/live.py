"""A report that can be read while the search runs: written again now and then, at a bounded part of the time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from pathlib import Path

from hybridnas.study.records import StudyMeta, TrialRecord

SHARE = 0.03  # of the time; a report that takes a second is written every half minute
FIRST = 20.0  # seconds before the first one: a short search writes one, at its end


class LiveReport:
    """Writes the study's report when records have changed and it has been long enough."""

    def __init__(self, folder: Path, meta: StudyMeta, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.meta = meta
        self.clock = clock
        self.began = clock()
        self.due = self.began + FIRST
        self.seen: frozenset[tuple[int, str, int]] = frozenset()

    def update(self, records: Collection[TrialRecord]) -> bool:
        """Write the report if it is due; returns whether it was written."""
        now = self.clock()
        state = frozenset((record.number, record.state, record.tokens) for record in records)
        if now < self.due or state == self.seen:
            return False
        from hybridnas.report.report import write_report

        ordered = sorted(records, key=lambda record: record.number)
        write_report(self.folder, ordered, dataclasses.replace(self.meta, seconds=now - self.began, status="running"))
        self.seen = state
        self.due = self.clock() + (self.clock() - now) / SHARE
        return True
