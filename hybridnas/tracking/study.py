"""Tracking of a search as a callback of its runner: the study's run, and one run for each trial."""

from __future__ import annotations

from collections.abc import Callable

from hybridnas.study.callbacks import (
    FAILED,
    INTERRUPTED,
    StudyCallback,
    StudyEnded,
    StudyStarted,
    TrialEnded,
    TrialMeasured,
    TrialStarted,
)
from hybridnas.study.records import ARCH, COMPLETE, FAIL, PRUNED, trial_folder
from hybridnas.tracking import tracker as status
from hybridnas.tracking.mlflow import open_tracker
from hybridnas.tracking.tracker import BackgroundTracker, Tracker, record_params

ATTACHED = ("report.html", "leaderboard.csv")  # files of a study that its run keeps a copy of


class StudyTracking(StudyCallback):
    """Records a search in a tracker: in MLflow where the study's ``tracking`` says, or in one of your own.

    ``make`` builds a tracker from the event that opens a study, for example
    ``StudyTracking(lambda event: MyTracker(event.folder))``. It comes after the callbacks that write the report.
    """

    def __init__(self, make: Callable[[StudyStarted], Tracker] | None = None) -> None:
        self._make = make
        self._tracker: BackgroundTracker | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        """Open the tracker and make up for what a kill or an outage kept from it."""
        name = event.meta.name
        if self._make is not None:
            self._tracker = BackgroundTracker(self._make(event), name)
        else:
            self._tracker = open_tracker(event.tracking, event.folder, name, event.identity)
        self._tracker.annotate({}, {"reference": event.meta.reference or ""})
        self._tracker.sync(event.records)

    def on_trial_start(self, event: TrialStarted) -> None:
        """Open the trial's run."""
        record = event.record
        tags = {"pattern": record.pattern, "fingerprint": record.fingerprint, "preset": record.preset}
        if self._tracker is not None:
            self._tracker.start_trial(record.number, record_params(record), tags)

    def on_trial_eval(self, event: TrialMeasured) -> None:
        """Record a measurement."""
        if self._tracker is not None:
            self._tracker.log_eval(event.number, event.values)

    def on_trial_end(self, event: TrialEnded) -> None:
        """Close the trial's run; one that nobody opened here (a duplicate, another worker's) is recorded whole."""
        record = event.record
        if self._tracker is not None:
            trained = record.state in (COMPLETE, PRUNED, FAIL)
            files = [trial_folder(event.folder, record.number) / ARCH] if trained else []
            self._tracker.end_trial(record.number, record.state, record, files)

    def on_study_end(self, event: StudyEnded) -> None:
        """Attach the report and the leaderboard, and close the study's run."""
        if self._tracker is not None:
            if event.last:
                self._tracker.sync(event.records)
                self._tracker.log_artifacts(event.folder / name for name in ATTACHED)
            ended = {FAILED: status.FAILED, INTERRUPTED: status.KILLED}
            self._tracker.close(ended.get(event.ended, status.FINISHED))
            self._tracker = None
