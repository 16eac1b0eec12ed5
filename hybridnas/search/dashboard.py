"""``STUDY/journal.log``: the study for optuna-dashboard, written from the records and never read back.

It holds two studies. NAME has every trial under the number that the report gives it. NAME: choices has those that the
space drew; presets have no choices, and beside them Optuna finds no parameter that all trials share, so that its
importances, slices and contours stay empty. There the numbers are the same, and what is left out is a failed trial.

It may be deleted at any time; the next search call, or :func:`write_journal`, makes it again::

    optuna-dashboard runs/STUDY/journal.log
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.search.plan import Plan
from hybridnas.search.sampling.optuna_view import quiet
from hybridnas.study.callbacks import StudyCallback, StudyEnded, StudyStarted, TrialEnded
from hybridnas.study.records import TrialRecord

JOURNAL = "journal.log"
SHARE = 0.02  # of the time that a search takes may go into writing it
FIRST = 30.0  # seconds before the first one: a short search writes one, at its end


def write_journal(
    folder: Path, name: str, plan: Plan, records: Sequence[TrialRecord], facts: Mapping[str, Any]
) -> Path:
    """Write a study's journal, whole or not at all, with ``facts`` as the study's attributes; returns its path."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / JOURNAL
    everything = range(1, plan.rungs[-1] + 1)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".journal-") as temporary:
        new = Path(temporary) / JOURNAL
        with quiet():
            storage = JournalStorage(JournalFileBackend(str(new)))
            drawn = [record for record in records if record.preset is None]
            for title, kept in ((name, records), (f"{name}: choices", drawn)):
                study = plan.view.study([], name=title, storage=storage)
                study.set_metric_names(list(plan.objectives))
                for key, value in facts.items():
                    study.set_user_attr(key, value)
                by_number = {record.number: record for record in kept}
                for number in range(max(by_number, default=-1) + 1):
                    study.add_trial(plan.view.trial(by_number.get(number), at=everything, live=True))
        new.replace(path)
    return path


class JournalExport(StudyCallback):
    """Writes the journal at the end of a search, and now and then while it runs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._started: StudyStarted | None = None
        self._due = time.monotonic() + FIRST

    def on_study_start(self, event: StudyStarted) -> None:
        self._started = event

    def on_trial_end(self, event: TrialEnded) -> None:
        if time.monotonic() >= self._due:
            began = time.monotonic()
            self._write(event.folder, list(event.records.values()))
            self._due = time.monotonic() + (time.monotonic() - began) / SHARE

    def on_study_end(self, event: StudyEnded) -> None:
        if event.last:
            self._write(event.folder, event.records)

    def _write(self, folder: Path, records: Sequence[TrialRecord]) -> None:
        assert self._started is not None
        meta = self._started.meta
        facts = {
            "space": meta.space,
            "budget": meta.budget,
            "data": meta.data,
            "reference": meta.reference,
            "active_params": meta.active_params,
            "seed": meta.seed,
            "objectives": list(self.plan.objectives),
            "limits": dict(self.plan.limits),
            "tokens_per_trial": meta.tokens,
            "sampler": meta.sampler,
            "pruner": meta.pruner,
            "command": meta.command,
            **{f"trials_{state}": count for state, count in Counter(record.state for record in records).items()},
        }
        with contextlib.suppress(OSError):  # a view for people; a full disk is met by what matters
            write_journal(folder, meta.name, self.plan, records, facts)
