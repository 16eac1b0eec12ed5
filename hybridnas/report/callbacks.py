"""What a search writes for people, as callbacks: the leaderboard after every trial, the report, lines in a terminal."""

from __future__ import annotations

from collections.abc import Callable

from hybridnas.report.console import trial_line
from hybridnas.report.leaderboard import write_leaderboard
from hybridnas.report.live import LiveReport
from hybridnas.study.callbacks import StudyCallback, StudyEnded, StudyStarted, TrialEnded
from hybridnas.study.records import StudyMeta


class ReportFiles(StudyCallback):
    """Writes ``leaderboard.csv`` after every trial, and ``report.html`` now and then and at the end."""

    def __init__(self) -> None:
        self._meta: StudyMeta | None = None
        self._live: LiveReport | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        self._meta = event.meta
        self._live = LiveReport(event.folder, event.meta)

    def on_trial_end(self, event: TrialEnded) -> None:
        assert self._meta is not None and self._live is not None
        records = [event.records[number] for number in event.records]
        write_leaderboard(event.folder, records, self._meta.reference)
        self._live.update(records)

    def on_study_end(self, event: StudyEnded) -> None:
        from hybridnas.report.report import write_report

        if event.last:
            write_leaderboard(event.folder, event.records, event.meta.reference)
            write_report(event.folder, event.records, event.meta)


class ConsoleLines(StudyCallback):
    """Hands one line for every trial that ended, and every note, to ``show``."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._reference: str | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        self._reference = event.meta.reference

    def on_trial_end(self, event: TrialEnded) -> None:
        self._show(trial_line(event.record, event.records, self._reference))

    def on_note(self, text: str) -> None:
        self._show(text)
