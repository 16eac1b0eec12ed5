"""Callbacks of a search that people read: leaderboard and report files, and lines for a terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping

from hybridnas.analysis.ranking import preset_loss
from hybridnas.report.leaderboard import write_leaderboard
from hybridnas.report.report import write_report
from hybridnas.study.callbacks import StudyCallback, StudyEnded, StudyStarted, TrialEnded
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, TrialRecord

SHARE = 0.03  # of the time that may be spent on reports: one that takes a second is written every half minute
FIRST = 20.0  # seconds before the first report: a short search writes one, at its end


class ReportFiles(StudyCallback):
    """Writes ``leaderboard.csv`` after every trial, and ``report.html`` at the end and, within SHARE, on the way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written: frozenset[tuple[int, str, int]] = frozenset()  # the records that the last report shows

    def on_study_start(self, event: StudyStarted) -> None:
        """Start the clock of the reports."""
        self._study = event
        self._began = self._clock()
        self._due = self._began + FIRST

    def on_trial_end(self, event: TrialEnded) -> None:
        """Write the leaderboard, and the report if it is due."""
        records = sorted(event.records.values(), key=lambda record: record.number)
        write_leaderboard(event.folder, records, self._study.meta.reference)
        now, shown = self._clock(), _shown(records)
        if now < self._due or shown == self._written:
            return
        meta = dataclasses.replace(self._study.meta, seconds=now - self._began, status="running")
        write_report(event.folder, records, meta)
        self._written = shown
        self._due = self._clock() + (self._clock() - now) / SHARE

    def on_study_end(self, event: StudyEnded) -> None:
        """Write both; of several workers the last one to end does."""
        if event.last:
            write_leaderboard(event.folder, event.records, event.meta.reference)
            write_report(event.folder, event.records, event.meta)


def _shown(records: Collection[TrialRecord]) -> frozenset[tuple[int, str, int]]:
    return frozenset((record.number, record.state, record.tokens) for record in records)


class ConsoleLines(StudyCallback):
    """Passes one line for every trial that ended, and every note, to ``show``."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._reference: str | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        """Keep the preset that losses are compared with."""
        self._reference = event.meta.reference

    def on_trial_end(self, event: TrialEnded) -> None:
        """Show the trial's line."""
        self._show(trial_line(event.record, event.records, self._reference))

    def on_note(self, text: str) -> None:
        """Show the note."""
        self._show(text)


def trial_line(record: TrialRecord, records: Mapping[int, TrialRecord], reference: str | None) -> str:
    """Return the line for a trial that has just ended; ``records`` are all so far, by number."""
    name = record.preset or record.choices.get("candidate")
    head = f"trial {record.number:>3}  {f'{name}  ' if name else ''}{record.pattern or dict(record.choices)}"
    if record.state == INFEASIBLE:
        return f"{head}  infeasible: {record.reason}"
    if record.state == FAIL:
        return f"{head}  failed: {record.reason}"
    if record.state == DUPLICATE:
        return f"{head}  {record.reason}"
    loss = f"{record.valid_loss:.4f}" if record.valid_loss is not None else "-"
    mark = preset_loss(records.values(), reference)
    difference = ""
    if record.state == COMPLETE and record.valid_loss is not None and mark is not None and record.preset != reference:
        difference = f"  ({record.valid_loss - mark:+.4f} to {reference})"
    speed = f", {record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
    state = "" if record.state == COMPLETE else f"  pruned at {record.tokens:,} tokens"
    return f"{head}  loss {loss}{difference}{state}  {record.seconds:.0f} s{speed}"
