"""What a tracker is, and how runs are recorded in one without any cost for the training.

A :class:`Tracker` writes runs somewhere (MLflow, a file, another service); a new one is one class with six methods.
:class:`BackgroundTracker` calls it from one background thread fed by a queue, so training never waits. Whatever the
tracker raises costs one warning; then tracking is off and training goes on.
"""

from __future__ import annotations

import atexit
import logging
import queue
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hybridnas.config import flatten
from hybridnas.study.records import RUNNING, TrialRecord
from hybridnas.tracking.secrets import masked

FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"  # how the run of a whole study or training ended
FLUSH_SECONDS = 60.0  # how long close() waits for what is still in the queue

log = logging.getLogger("hybridnas.tracking")


class Tracker(Protocol):
    """A place where runs are recorded. All calls come from one thread, in order; a call may raise anything.

    A run is known by its trial's number; None is the run of the study itself, or of a training that stands alone.
    Values come flat and masked: parameters and tags are texts, metrics are numbers.
    """

    @property
    def place(self) -> str:
        """Where the runs are recorded, for messages."""
        ...

    def open(self) -> None:
        """Connect, and find out which runs there are; must leave every existing run as it is."""
        ...

    def known(self, number: int) -> tuple[str, str] | None:
        """Return fingerprint and state of a trial that is recorded already; None where it is not."""
        ...

    def start(self, number: int | None, title: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Make a run, or go on with the one there is; called before anything else is recorded of a run."""
        ...

    def log(self, number: int | None, metrics: Mapping[str, float], tokens: int) -> None:
        """Record metrics at a count of training tokens; the same measurement may come twice."""
        ...

    def end(self, number: int | None, state: str, tags: Mapping[str, str]) -> None:
        """End a run: a trial with its record's state, the run None with FINISHED, KILLED or FAILED."""
        ...

    def attach(self, number: int | None, path: Path) -> None:
        """Keep a copy of a file with a run."""
        ...


class BackgroundTracker:
    """Records runs in a tracker from a background thread. Its methods return at once and never raise.

    The study's own run is touched by the first call that records something. So a command that is refused after its
    tracker was opened leaves a finished run as it is.
    """

    def __init__(self, tracker: Tracker | None, name: str) -> None:
        """Start recording; ``tracker=None`` records nothing. ``name`` is what the study's own run is called."""
        self.off = tracker is None  # True after the one warning, too
        self._name = name
        self._begun = False
        self._closed = tracker is None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        if tracker is not None:
            self._tracker = tracker
            self._thread = threading.Thread(target=self._work, name="hybridnas-tracking", daemon=True)
            self._thread.start()
            atexit.register(self.close, KILLED)

    def ready(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until the tracker is open; False when tracking is off."""
        if not self.off:
            self._opened.wait(timeout)
        return self._opened.is_set() and not self.off

    def annotate(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Give the study's own run parameters and tags: what a training that stands alone trains."""
        flat, marks = _texts(params), _texts(tags)

        def job() -> None:
            self._begun = True
            self._tracker.start(None, self._name, flat, marks)

        self._post(job)

    def start_trial(self, number: int, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Open a trial's run, or the one it already has when the same fingerprint is tried again.

        ``params`` may be nested; ``tags`` are short names (pattern, fingerprint, preset).
        """
        flat, marks = _texts(params), _texts(tags)
        self._post(lambda: self._start(number, flat, marks))

    def log_eval(self, number: int | None, values: Mapping[str, Any]) -> None:
        """Record one evaluation of a trial (None: of the study's own run) at its ``tokens``."""
        metrics, tokens = numbers(values), int(values.get("tokens", 0))

        def job() -> None:
            self._begin()
            self._tracker.log(number, metrics, tokens)

        self._post(job)

    def end_trial(
        self, number: int, state: str, record: TrialRecord | None = None, artifacts: Iterable[Path | str] = ()
    ) -> None:
        """Give a trial's run its last figures, its files and its state."""
        paths = [Path(path) for path in artifacts]
        self._post(lambda: self._end(number, state, record, paths))

    def sync(self, records: Iterable[TrialRecord]) -> None:
        """Record every finished trial that the tracker lacks or knows as running: what a kill or an outage lost."""
        finished = [record for record in records if record.state != RUNNING]
        self._post(lambda: self._sync(finished))

    def log_artifacts(self, paths: Iterable[Path | str]) -> None:
        """Attach files (report, leaderboard) to the study's own run."""
        files = [Path(path) for path in paths]

        def job() -> None:
            self._begin()
            self._attach(None, files)

        self._post(job)

    def close(self, status: str = FINISHED, timeout: float = FLUSH_SECONDS) -> None:
        """Write what is queued, set the study's status (FINISHED, KILLED or FAILED) and stop; safe to call twice.

        A study of which nothing was recorded since :meth:`__init__` keeps the status that it had.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._jobs.put(lambda: self._tracker.end(None, status, {}) if self._begun else None)
        self._jobs.put(None)
        self._thread.join(timeout)
        if self._thread.is_alive() and not self.off:
            self._give_up(f"it did not take what was queued within {timeout:.0f} s")

    def __enter__(self) -> BackgroundTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close(FINISHED if kind is None else KILLED if interrupted else FAILED)

    # On the thread.

    def _post(self, job: Callable[[], None]) -> None:
        if not (self.off or self._closed):
            self._jobs.put(job)

    def _work(self) -> None:
        self._try(lambda: self._tracker.open())
        self._opened.set()
        while (job := self._jobs.get()) is not None:
            if not self.off:
                self._try(job)

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:  # a tracker and the libraries below it may raise anything; none may cost a trial
            self._give_up(first_line(error))

    def _give_up(self, reason: str) -> None:
        self.off = True
        log.warning(
            "tracking of %s in %s is off for the rest of this run: %s; training goes on and records its own results",
            self._name,
            masked(self._tracker.place),
            masked(reason),
        )

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._tracker.start(None, self._name, {}, {})

    def _start(self, number: int, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._begin()
        title = f"{number:04d} {tags.get('preset') or tags.get('pattern', '')}".strip()
        self._tracker.start(number, title, params, tags)

    def _end(self, number: int, state: str, record: TrialRecord | None, artifacts: Iterable[Path]) -> None:
        self._begin()
        if self._tracker.known(number) is None and record is not None:
            self._record(record)
        self._attach(number, artifacts)
        tags = {"state": state}
        if record is not None:
            last = {"best_valid_loss": record.valid_loss, "seconds": record.seconds}
            figures = {**last, "tokens": record.tokens, "tokens_per_second": record.tokens_per_second}
            self._tracker.log(number, numbers(figures), record.tokens)
            tags |= {"reason": masked(record.reason)} if record.reason else {}
        self._tracker.end(number, state, tags)

    def _attach(self, number: int | None, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_file():
                self._tracker.attach(number, path)

    def _sync(self, records: Iterable[TrialRecord]) -> None:
        for record in records:
            if self._tracker.known(record.number) == (record.fingerprint, record.state):
                continue
            self._record(record)
            self._end(record.number, record.state, record, [])

    def _record(self, record: TrialRecord) -> None:
        """Open a run for a trial that trained elsewhere or earlier, with its whole curve."""
        tags = {"pattern": record.pattern, "fingerprint": record.fingerprint, "preset": record.preset}
        self._start(record.number, record_params(record), _texts(tags))
        for entry in record.curve or [{"tokens": tokens, "valid_loss": loss} for tokens, loss in record.points()]:
            self._tracker.log(record.number, numbers(entry), int(entry.get("tokens", 0)))


def record_params(record: TrialRecord) -> dict[str, str]:
    """Return the parameters of a trial that trackers show: its architecture, costs, choices and seed."""
    own = {"pattern": record.pattern, "fingerprint": record.fingerprint, "seed": record.seed, "preset": record.preset}
    return _texts({**own, **record.cost, "choices": dict(record.choices)})


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers in an evaluation, mappings flattened with dots; of a vector its least and its greatest."""
    found: dict[str, float] = {}
    for name, value in flatten(values).items():
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
            found.update({f"{name}.min": float(min(value)), f"{name}.max": float(max(value))})
    return found


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, or its type where it says nothing."""
    cause = re.search(r"Caused by (\w+)", str(error))
    if cause:
        return f"the server gave no answer ({cause[1]})"
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested values as flat masked texts; None is left out, as an absent parameter."""
    return {name: str(value) for name, value in flatten(masked(values)).items() if value not in (None, {})}
