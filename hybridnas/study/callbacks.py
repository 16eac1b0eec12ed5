"""Events of a search and the class that receives them: leaderboards, reports, trackers, consoles derive from it.

The runner of :mod:`hybridnas.search` calls every callback in the order in which they were given, in its own thread, in
the process that the user started (workers hand their events to it). A callback must return soon. What it raises ends
the search: a callback that may fail, such as one that talks to a server, catches its own errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridnas.study.records import StudyMeta, TrialRecord

NEW, RESUMED, PROMOTED = "new", "resumed", "promoted"  # why a trial starts
# Why a search ends; "failed" means that it raised.
COMPLETED, TIME, TOKENS, EXHAUSTED, INTERRUPTED, FAILED = (
    *("completed", "time", "tokens", "exhausted", "interrupted", "failed"),
)


@dataclass(frozen=True, kw_only=True)
class StudyStarted:
    """A study was opened: its settings agree with what is stored and nothing was trained yet."""

    folder: Path
    meta: StudyMeta
    identity: Mapping[str, Any]  # the settings that make this study, as study.json has them
    records: Sequence[TrialRecord] = ()  # what was recorded before, by number
    tracking: str | None = None  # what the user asked for: a URI; None: the study's own; shared, off
    tracking_experiment: str = "hybridnas"  # name of MLflow's experiment


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial begins to train, or goes on."""

    record: TrialRecord  # state RUNNING: number, pattern, fingerprint, choices and cost are known
    tokens: int = 0  # training tokens that it has had already
    why: str = NEW  # NEW | RESUMED | PROMOTED


@dataclass(frozen=True, kw_only=True)
class TrialMeasured:
    """A trial was evaluated; evaluations that an earlier process made are not repeated."""

    number: int
    values: Mapping[str, Any]  # an entry of TrialRecord.curve: tokens, valid_loss, train_loss, ...


@dataclass(frozen=True, kw_only=True)
class TrialEnded:
    """A trial's record was written, by this process or by another worker of the study."""

    record: TrialRecord
    records: Mapping[int, TrialRecord]  # all so far, this one among them
    folder: Path  # of the study


@dataclass(frozen=True, kw_only=True)
class StudyEnded:
    """A search call has ended; a study may go on in a later one."""

    folder: Path
    meta: StudyMeta  # with seconds, status and notes
    records: Sequence[TrialRecord]  # by number
    ended: str  # COMPLETED | TIME | TOKENS | EXHAUSTED | INTERRUPTED | FAILED
    last: bool = True  # False: other workers go on, and the last one to end writes the report


class StudyCallback:
    """Receives the events of a search; override what you need."""

    def on_study_start(self, event: StudyStarted) -> None:
        """Called once, after the study was opened and before anything is trained."""

    def on_trial_start(self, event: TrialStarted) -> None:
        """Called when this process begins to train a trial, or goes on with one."""

    def on_trial_eval(self, event: TrialMeasured) -> None:
        """Called after every evaluation of a trial that this process trains."""

    def on_trial_end(self, event: TrialEnded) -> None:
        """Called when a trial's record was written: trained, paused, failed, rejected or a duplicate."""

    def on_study_end(self, event: StudyEnded) -> None:
        """Called once at the end, also after Ctrl-C and after an error."""

    def on_note(self, text: str) -> None:
        """Called with one sentence for a person who watches, such as why a trial goes on."""


class Callbacks(StudyCallback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Sequence[StudyCallback] = ()) -> None:
        self.callbacks = tuple(callbacks)

    def on_study_start(self, event: StudyStarted) -> None:
        for callback in self.callbacks:
            callback.on_study_start(event)

    def on_trial_start(self, event: TrialStarted) -> None:
        for callback in self.callbacks:
            callback.on_trial_start(event)

    def on_trial_eval(self, event: TrialMeasured) -> None:
        for callback in self.callbacks:
            callback.on_trial_eval(event)

    def on_trial_end(self, event: TrialEnded) -> None:
        for callback in self.callbacks:
            callback.on_trial_end(event)

    def on_study_end(self, event: StudyEnded) -> None:
        for callback in self.callbacks:
            callback.on_study_end(event)

    def on_note(self, text: str) -> None:
        for callback in self.callbacks:
            callback.on_note(text)
