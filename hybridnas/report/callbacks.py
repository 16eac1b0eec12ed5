"""Callbacks of a search that people read: leaderboard and report files, and lines for a terminal."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping

from hybridnas.analysis.ranking import preset_loss, winner
from hybridnas.report.html import short
from hybridnas.report.leaderboard import write_leaderboard
from hybridnas.report.report import write_report
from hybridnas.report.status import TRAINED, seconds_left
from hybridnas.study.callbacks import StudyCallback, StudyEnded, StudyStarted, TrialEnded
from hybridnas.study.records import COMPLETE, DUPLICATE, PRUNED, WORDS, StudyMeta, TrialRecord
from hybridnas.units import duration

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
    """Passes one line for every trial that ended, and every note, to ``show``.

    ``width``: characters that a line may have; None: a pipe, which gets whole lines of separated words.
    """

    def __init__(self, show: Callable[[str], None], width: int | None = None) -> None:
        self._show = show
        self._width = width
        self._meta: StudyMeta | None = None
        self._headed = False

    def on_study_start(self, event: StudyStarted) -> None:
        """Keep what lines are about."""
        self._meta = event.meta

    def on_trial_end(self, event: TrialEnded) -> None:
        """Show the trial's line."""
        meta = self._meta
        if self._width is not None and not self._headed:
            self._headed = True
            self._show(_heading(None if meta is None else meta.reference, self._width))
        left = None if meta is None else time_left(event, meta)
        self._show(trial_line(event.record, event.records, meta, left=left, width=self._width))

    def on_note(self, text: str) -> None:
        """Show the note."""
        self._show(text)


def time_left(event: TrialEnded, meta: StudyMeta) -> float | None:
    """Return about how long the search will take [s]; None where its trials are looked up, or before the first."""
    records = list(event.records.values())
    return None if meta.from_table else seconds_left(event.folder, records, meta.n_trials)


def _heading(reference: str | None, width: int) -> str:
    """Return the heads of the columns of ``trial_line``."""
    head, gap = "  trial       architecture", f"vs {reference}" if reference is not None else ""
    tail = f" {'loss':>7} {gap if len(gap) <= 8 else 'vs ref':>8} {'time':>7}  {'':<11}"
    return f"{head:<{width - len(tail)}}{tail}".rstrip()


def trial_line(
    record: TrialRecord,
    records: Mapping[int, TrialRecord],
    meta: StudyMeta | None,
    *,
    left: float | None = None,
    width: int | None = None,
) -> str:
    """Return the line for a trial that has just ended; ``records`` are all so far, by number.

    It says which trial it is of how many, its loss, its distance to the reference, time, the best so far and the time
    ``left`` [s]. Where a line may have ``width`` characters, each of these has its place and the name is cut.
    """
    reference = None if meta is None else meta.reference
    reason = "" if record.state in (COMPLETE, PRUNED) else f"{WORDS[record.state]}: {record.reason}"
    if record.state == DUPLICATE:
        reason = record.reason or WORDS[DUPLICATE]
    best = winner(records.values())
    first = best is not None and best.number == record.number
    gap = ""
    mark = preset_loss(records.values(), reference)
    if record.state == COMPLETE and record.valid_loss is not None and mark is not None and record.preset != reference:
        gap = f"{record.valid_loss - mark:+.4f}"
    done = sum(one.state in TRAINED for one in records.values())
    of = f"{done}/{meta.n_trials}" if meta is not None and meta.n_trials else str(done)
    name = " ".join(filter(None, [record.preset or record.choices.get("candidate"), record.pattern]))
    name = name or str(dict(record.choices))
    loss = "" if record.valid_loss is None else f"{record.valid_loss:.4f}"
    if width is not None:
        head = f"{of:>7} #{record.number:<4} "
        if reason:
            text = f"{head}{name}  {reason}"
            return text if len(text) <= width else f"{text[: width - 1]}…"
        note = "best so far" if first else WORDS[PRUNED] if record.state == PRUNED else ""
        tail = f" {loss:>7} {gap:>8} {record.seconds:>5.0f} s  {note:<11}"
        return f"{head}{short(name, width - len(head) - len(tail)):<{width - len(head) - len(tail)}}{tail}".rstrip()
    parts = [f"trial {record.number}", of, name]
    if reason:
        return "  ".join([*parts, reason])
    parts += [f"loss {loss or '-'}", f"{gap} to {reference}" if gap else ""]
    parts += [f"pruned at {record.tokens:,} tokens" if record.state == PRUNED else "", f"{record.seconds:.0f} s"]
    parts += [f"{record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""]
    if best is not None and not first:
        parts.append(f"best {best.valid_loss:.4f} {best.name}")
    parts += ["best so far" if first else "", f"about {duration(left)} left" if left else ""]
    return "  ".join(filter(None, parts))
