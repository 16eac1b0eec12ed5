"""Tracking of a search as a callback of its runner: the study's run, and one run for each trial."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from hybridnas.study.objectives import eligible, objectives_of, score
from hybridnas.study.records import ARCH, COMPLETE, FAIL, PRUNED, TrialRecord, trial_folder
from hybridnas.tracking import tracker as status
from hybridnas.tracking.mlflow import open_tracker, standing_tags
from hybridnas.tracking.tracker import BackgroundTracker, Data, RunFacts, Tracker, texts, times, trial_facts

ATTACHED = ("report.html", "leaderboard.csv", "best")  # of a study folder, what its run keeps a copy of
TRIAL_TEXT = "Step, the x axis of the charts, is training tokens."


class StudyTracking(StudyCallback):
    """Records a search in a tracker: in MLflow where the study's ``tracking`` says, or in one of your own.

    ``make`` builds a tracker from the event that opens a study, for example
    ``StudyTracking(lambda event: MyTracker(event.folder))``. It comes after the callbacks that write the report.
    A search that fails before anything was recorded leaves the runs of an earlier call as they are.
    """

    def __init__(self, make: Callable[[StudyStarted], Tracker] | None = None) -> None:
        self._make = make
        self._tracker: BackgroundTracker | None = None

    def on_study_start(self, event: StudyStarted) -> None:
        """Open the tracker and make up for what a kill or an outage kept from it."""
        name = event.meta.name
        if event.tracking == "off" and self._make is None:
            return
        if self._make is not None:
            self._tracker = BackgroundTracker(self._make(event), name)
        else:
            self._tracker = open_tracker(
                event.tracking, event.folder, name, event.identity, experiment=event.tracking_experiment
            )
        about = StudyFacts(event)
        self._tracker.describe = about.trial
        self._tracker.about(about.study(event.records))
        self._tracker.sync(event.records)
        for number, values in progress(event.records):
            self._tracker.log_best(number, values, again=True)

    def on_trial_start(self, event: TrialStarted) -> None:
        """Open the trial's run."""
        if self._tracker is not None:
            self._tracker.start(event.record.number, self._tracker.describe(event.record))

    def on_trial_eval(self, event: TrialMeasured) -> None:
        """Record a measurement."""
        if self._tracker is not None:
            self._tracker.log_eval(event.number, event.values)

    def on_trial_end(self, event: TrialEnded) -> None:
        """Close the trial's run; one that nobody opened here (a duplicate, another worker's) is recorded whole."""
        record = event.record
        if self._tracker is None:
            return
        trained = record.state in (COMPLETE, PRUNED, FAIL)
        files = [trial_folder(event.folder, record.number) / ARCH] if trained else []
        self._tracker.end_trial(record.number, record.state, record, files)
        known = [one for number, one in event.records.items() if number <= record.number]
        for number, values in progress([*known, record])[-1:]:
            if number == record.number:
                self._tracker.log_best(number, values)

    def on_study_end(self, event: StudyEnded) -> None:
        """Attach the report, the leaderboard and the winner's model, and close the study's run."""
        if self._tracker is not None:
            if event.last:
                self._tracker.sync(event.records)
                self._tracker.log_artifacts(event.folder / name for name in ATTACHED)
            ended = {FAILED: status.FAILED, INTERRUPTED: status.KILLED}
            self._tracker.close(ended.get(event.ended, status.FINISHED), tags=_result(event))
            self._tracker = None


class StudyFacts:
    """What the runs of a study are given: its settings, its data, and of a trial all that decides its numbers."""

    def __init__(self, event: StudyStarted) -> None:
        self.folder = event.folder
        self.meta, self.identity = event.meta, event.identity
        self.tags = standing_tags(event.meta.command)
        settings = self.identity.get("data") or {}
        self.data = Data(
            name=_named(settings), fingerprint=_fingerprint(event.folder), words=event.meta.data, settings=settings
        )

    def study(self, records: Iterable[TrialRecord] = ()) -> RunFacts:
        """Return the facts of the study's own run; it began with the first of the trials that there are."""
        meta = self.meta
        params = {
            **self.identity,
            "data": {**(self.identity.get("data") or {}), "words": meta.data},
            "active_params": meta.active_params,
            "tokens_per_trial": meta.tokens,
            "n_trials": meta.n_trials,
            "reference": meta.reference,
            "machine": meta.machine,
            "versions": dict(meta.versions),
        }
        words = [
            f"Search of the space **{meta.space}** with the budget **{meta.budget}** on {meta.data}.",
            f"Every candidate has {meta.active_params or 0:,} active parameters and trains for up to "
            f"{meta.tokens or 0:,} tokens.",
            "Charts: Step, the x axis, is the number of the trial here, and training tokens in the runs of the trials.",
            *([f"Again: `{meta.command}`"] if meta.command else []),
        ]
        tags = {**self.tags, "reference": meta.reference or "", "description": "\n\n".join(words)}
        began = [times(record)[0] for record in records if record.legs]
        at = min(began, default=time.time())
        return RunFacts(title=meta.name, params=texts(params), tags=texts(tags), data=self.data, at=at)

    def trial(self, record: TrialRecord) -> RunFacts:
        """Return the facts of a trial's run: those of its record, of its architecture and of how it is trained."""
        meta, facts = self.meta, trial_facts(record)
        params = {
            "lr": meta.lr if record.lr is None else record.lr,
            "batch_size": meta.batch_size,
            "seq_len": meta.seq_len,
            "tokens_asked": meta.tokens,
            "schedule": meta.schedule,
            "data": self.data.name,
            "data_fingerprint": self.data.fingerprint or None,
            **_architecture(trial_folder(self.folder, record.number) / ARCH),
        }
        tags = {**self.tags, "description": TRIAL_TEXT}
        return replace(
            facts, params={**texts(params), **facts.params}, tags={**texts(tags), **facts.tags}, data=self.data
        )


def progress(records: Iterable[TrialRecord]) -> list[tuple[int, dict[str, float]]]:
    """Return (trial number, metrics) of each trial that was trained to the end, in order of number.

    ``best_NAME`` is the best value of the first objective among this trial and those of lower number, ``trial_NAME``
    the trial's own; the loss has its usual name ``valid_loss``.
    """
    found = []
    best: TrialRecord | None = None
    latest = {record.number: record for record in records}
    for _, record in sorted(latest.items()):
        own = score(record)
        if not eligible(record) or own is None:
            continue
        leading = score(best) if best is not None else None
        if leading is None or own < leading:
            best = record
        assert best is not None
        name = next(iter(objectives_of(record)))
        shown = "valid_loss" if name == "val_loss" else name
        values = {f"best_{shown}": objectives_of(best)[name], f"trial_{shown}": objectives_of(record)[name]}
        found.append((record.number, values))
    return found


def _result(event: StudyEnded) -> dict[str, Any]:
    """Return the tags of a study that has ended: which trial is best, and why the search ended."""
    best = min((one for one in event.records if eligible(one)), key=lambda one: score(one) or 0.0, default=None)
    if best is None:
        return {"ended": event.ended}
    return {"ended": event.ended, "best_trial": best.number, "best_pattern": best.pattern}


def _named(settings: Mapping[str, Any]) -> str:
    """Return what a data set is called: its kind, and the last part of a name or path."""
    path = settings.get("path") or settings.get("name")
    first = path[0] if isinstance(path, (list, tuple)) and path else path
    last = str(first).rstrip("/").rpartition("/")[2] if first else ""
    return " ".join(part for part in (str(settings.get("kind", "data")), last) if part)


def _fingerprint(folder: Path) -> str:
    try:
        return str(json.loads((folder / "study.json").read_text(encoding="utf-8"))["data_fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _architecture(path: Path) -> dict[str, Any]:
    """Return the fields of an architecture that differ from the defaults, those of a block as ``E.n_experts``."""
    try:
        arch = json.loads(path.read_text(encoding="utf-8"))
        blocks = dict(arch.pop("blocks", {}))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {"d_model": arch.get("d_model"), "vocab_size": arch.get("vocab_size"), **blocks}
