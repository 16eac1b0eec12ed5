"""Status of a search, read while it runs: nothing is locked, nothing is written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.analysis.ranking import winner
from hybridnas.errors import StudyError
from hybridnas.search.storage.database import database_url, read_database
from hybridnas.search.storage.folder_store import FolderStore
from hybridnas.search.storage.store import Held
from hybridnas.study.folder import completed, read_study
from hybridnas.study.records import COMPLETE, FAIL, PRUNED, WORDS, TrialRecord, load_records, read_curve, trial_folder
from hybridnas.units import duration

TRAINED = (COMPLETE, PRUNED, FAIL)


@dataclass(frozen=True)
class Running:
    """A trial that was begun and has not ended; ``where`` is empty when its process died."""

    number: int
    pattern: str
    tokens: int
    valid_loss: float | None
    where: str


@dataclass(frozen=True)
class Status:
    """A study at one moment; ``seconds_left`` is a guess from the trials so far, None where there is none yet."""

    study: str
    records: Sequence[TrialRecord]
    running: Sequence[Running] = ()
    n_trials: int | None = None
    best: TrialRecord | None = None
    seconds_left: float | None = None
    states: Counter[str] = field(default_factory=Counter)

    @property
    def finished(self) -> int:
        """Trials that count towards ``n_trials``."""
        return sum(record.state in TRAINED for record in self.records)


def read_status(runs: Path, name: str, storage: str | None = None, heartbeat: int = 20) -> Status:
    """Return how a study stands, from its folder or from the database; raises StudyError when there is none."""
    url = database_url(storage)
    folder = runs / name
    if url is not None:
        card, records, held = read_database(url, name, heartbeat)
        return _status(name, card.get("limits") or {}, records, [_running(folder, one) for one in held])
    folder = completed(folder)
    name = folder.name
    meta = read_study(folder)
    store = FolderStore(folder)
    store.changes()
    running = [_running(folder, one) for one in store.running()]
    return _status(name, meta.get("limits") or {}, load_records(folder)[0], running)


def _running(folder: Path, held: Held) -> Running:
    """Describe a trial that trains, by its measurements where they lie here."""
    record = held.record
    curve = read_curve(trial_folder(folder, record.number)) or record.curve
    last: dict[str, Any] = dict(curve[-1]) if curve else {}
    return Running(record.number, record.pattern, last.get("tokens", 0), last.get("valid_loss"), held.where)


def _status(name: str, limits: dict[str, Any], records: list[TrialRecord], running: list[Running]) -> Status:
    counts = Counter(record.state for record in records)
    counts["RUNNING"] = sum(bool(trial.where) for trial in running)
    counts["INTERRUPTED"] = len(running) - counts["RUNNING"]
    n_trials = limits.get("n_trials")
    left = _seconds_left(records, n_trials, limits, counts["RUNNING"]) if n_trials is not None else None
    return Status(name, records, running, n_trials, winner(records), left, +counts)


def seconds_left(folder: Path, records: Sequence[TrialRecord], n_trials: int | None) -> float | None:
    """Return about how long a study that runs will take, judged by its trials so far; None before the first."""
    try:
        limits = read_study(folder).get("limits") or {}
    except StudyError:
        return None
    return None if n_trials is None else _seconds_left(records, n_trials, limits, limits.get("workers") or 1)


def _seconds_left(
    records: Sequence[TrialRecord], n_trials: int, limits: Mapping[str, Any], workers: int
) -> float | None:
    trained = [record.seconds for record in records if record.state in TRAINED]
    if not trained:
        return None
    left = max(0, n_trials - len(trained)) * sum(trained) / len(trained) / max(1, workers)
    if limits.get("minutes") is not None and workers:
        left = min(left, max(0.0, limits.get("since", 0.0) + 60 * limits["minutes"] - time.time()))
    return left


def lines(status: Status) -> list[str]:
    """Return the status as sentences, one fact a line."""
    of = f" of {status.n_trials}" if status.n_trials is not None else ""
    states = (
        ", ".join(f"{count} {WORDS.get(state, state.lower())}" for state, count in status.states.items())
        or "no trial yet"
    )
    found = [f"study {status.study}: {status.finished}{of} trials are finished ({states})"]
    for trial in status.running:
        loss = f", loss {trial.valid_loss:.4f} at {trial.tokens:,} tokens" if trial.valid_loss is not None else ""
        where = trial.where or "no worker: interrupted, goes on from its checkpoint"
        found.append(f"trial {trial.number:>3}  {trial.pattern or '(being drawn)'}{loss}  {where}")
    if status.best is not None and status.best.valid_loss is not None:
        found.append(f"best so far: trial {status.best.number}, {status.best.name}, loss {status.best.valid_loss:.4f}")
    if not any(trial.where for trial in status.running):
        done = status.n_trials is not None and status.finished >= status.n_trials
        more = "with a larger n_trials the same command goes on" if done else "the search's own command goes on"
        found.append(f"no process works on it now; {more}")
    elif status.seconds_left is not None:
        found.append(f"about {duration(status.seconds_left)} left, judged by the trials so far")
    return found
