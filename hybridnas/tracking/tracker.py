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
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from hybridnas.config import flatten
from hybridnas.study.records import RUNNING, SEED_RESULTS, TrialRecord
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.system import SystemMetrics

FINISHED, KILLED, FAILED = "FINISHED", "KILLED", "FAILED"  # how the run of a whole study or training ended
FLUSH_SECONDS = 60.0  # how long close() waits for what is still in the queue

log = logging.getLogger("hybridnas.tracking")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set of a run, for trackers that list data sets."""

    name: str
    fingerprint: str = ""  # equal where the tokens are equal
    words: str = ""  # what it is, in a sentence
    settings: Mapping[str, Any] = field(default_factory=dict)  # that open it again


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run when it starts, and what is added when it ends. Texts are flat and masked.

    Some tags have a meaning of their own that a tracker may know: ``description`` (Markdown), ``source`` (the command),
    ``git_commit`` (of the working folder) and ``user``.
    """

    title: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    data: Data | None = None
    at: float = 0.0  # Unix time [s]: of the start, or of the end


class Tracker(Protocol):
    """A place where runs are recorded. All calls come from one thread, in order; a call may raise anything.

    A run is known by its trial's number; None is the run of the study itself, or of a training that stands alone.
    Values come flat and masked: parameters and tags are texts, metrics are numbers. Times are those of the event
    [Unix time, s], not of the call, which comes later.
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

    def start(self, number: int | None, facts: RunFacts) -> None:
        """Make a run, or go on with the one there is; called before anything else is recorded of a run."""
        ...

    def log(self, number: int | None, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Record metrics at a count of training tokens; the same measurement may come twice.

        ``step`` of the study's own run is a trial's number.
        """
        ...

    def end(self, number: int | None, state: str, facts: RunFacts) -> None:
        """End a run: a trial with its record's state, the run None with FINISHED, KILLED or FAILED."""
        ...

    def attach(self, number: int | None, path: Path) -> None:
        """Keep a copy of a file with a run; a folder is an exported model."""
        ...


class BackgroundTracker:
    """Records runs in a tracker from a background thread. Its methods return at once and never raise.

    The study's own run is touched by the first call that records something. So a command that is refused after its
    tracker was opened leaves a finished run as it is.
    """

    def __init__(self, tracker: Tracker | None, name: str) -> None:
        """Start recording; ``tracker=None`` records nothing. ``name`` is what the study's own run is called."""
        self.off = tracker is None  # True after the one warning, too
        self.describe: Callable[[TrialRecord], RunFacts] = trial_facts  # what a trial's run is given of its record
        self._name = name
        self._about = RunFacts(title=name)  # of the study's own run
        self._begun = False
        self._live = False  # whether something happens now, and is not only made up for
        self._last = 0.0  # when the last trial that was made up for ended [Unix time]
        self._closed = tracker is None
        self._system = SystemMetrics()
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

    def about(self, facts: RunFacts) -> None:
        """Say what the study's own run is given as soon as something is recorded."""
        self._about = facts

    def annotate(self, params: Mapping[str, Any], tags: Mapping[str, Any], data: Data | None = None) -> None:
        """Give the study's own run parameters and tags now: what a training that stands alone trains."""
        facts = RunFacts(title=self._name, params=texts(params), tags=texts(tags), data=data, at=time.time())

        def job() -> None:
            self._begun = True
            self._tracker.start(None, facts)

        self._post(job)

    def start_trial(
        self, number: int, params: Mapping[str, Any], tags: Mapping[str, Any], data: Data | None = None
    ) -> None:
        """Open a trial's run, or the one it already has when the same fingerprint is tried again.

        ``params`` may be nested; ``tags`` are short names (pattern, fingerprint, preset).
        """
        self.start(number, RunFacts(params=texts(params), tags=texts(tags), data=data))

    def start(self, number: int, facts: RunFacts) -> None:
        """Open a trial's run now, whatever the time in ``facts``."""
        at = time.time()
        self._post(lambda: self._start(number, facts, at))

    def log_eval(self, number: int | None, values: Mapping[str, Any]) -> None:
        """Record one evaluation of a trial (None: of the study's own run) at its ``tokens``."""
        metrics, step, at = measured(values), int(values.get("tokens", 0)), time.time()
        metrics |= self._system.sample()

        def job() -> None:
            self._begin()
            self._tracker.log(number, metrics, step, at)

        self._post(job)

    def log_best(self, number: int, values: Mapping[str, float], *, again: bool = False) -> None:
        """Record in the study's own run how the search stands after a trial.

        ``again``: of a trial that an earlier call may have recorded; it touches a run alone that is touched anyway.
        """
        metrics, at = dict(values), time.time()

        def job() -> None:
            if again and not self._begun:
                return
            self._begin()
            self._tracker.log(None, metrics, number, at)

        self._post(job, live=not again)

    def end_trial(
        self, number: int, state: str, record: TrialRecord | None = None, artifacts: Iterable[Path | str] = ()
    ) -> None:
        """Give a trial's run its last figures, its files and its state."""
        paths, at = [Path(path) for path in artifacts], time.time()
        self._post(lambda: self._end(number, state, record, paths, at))

    def sync(self, records: Iterable[TrialRecord]) -> None:
        """Record every finished trial that the tracker lacks or knows as running: what a kill or an outage lost."""
        finished = [record for record in records if record.state != RUNNING]
        self._post(lambda: self._sync(finished), live=False)

    def log_artifacts(self, paths: Iterable[Path | str]) -> None:
        """Attach files (report, leaderboard) and exported models, which are folders, to the study's own run."""
        files = [Path(path) for path in paths]

        def job() -> None:
            self._begin()
            self._attach(None, files)

        self._post(job, live=False)

    def close(
        self, status: str = FINISHED, timeout: float = FLUSH_SECONDS, tags: Mapping[str, Any] | None = None
    ) -> None:
        """Write what is queued, set the study's status (FINISHED, KILLED or FAILED) and stop; safe to call twice.

        A study of which nothing was recorded since :meth:`__init__` keeps the status that it had.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        marks, now = texts(tags or {}), time.time()

        def job() -> None:
            if self._begun:
                at = now if self._live or not self._last else self._last
                self._tracker.end(None, status, RunFacts(tags=marks, at=at))

        self._jobs.put(job)
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

    def _post(self, job: Callable[[], None], *, live: bool = True) -> None:
        self._live = self._live or live
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
            self._tracker.start(None, self._about)

    def _start(self, number: int, facts: RunFacts, at: float) -> None:
        self._begin()
        title = f"{number:04d} {facts.tags.get('preset') or facts.tags.get('pattern', '')}".strip()
        self._tracker.start(number, replace(facts, title=title, at=at))

    def _end(self, number: int, state: str, record: TrialRecord | None, paths: Iterable[Path], at: float) -> None:
        self._begin()
        if self._tracker.known(number) is None and record is not None:
            self._record(record)
        self._attach(number, paths)
        facts = RunFacts(tags={"state": state}, at=at)
        if record is not None:
            last = {"best_valid_loss": record.valid_loss, "seconds": record.seconds, "tokens": record.tokens}
            self._tracker.log(number, numbers({**last, **_scores(record)}), record.tokens, at)
            reason = {"reason": masked(record.reason)} if record.reason else {}
            facts = replace(facts, params=self.describe(record).params, tags={**facts.tags, **reason})
        self._tracker.end(number, state, facts)

    def _attach(self, number: int | None, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.exists():
                self._tracker.attach(number, path)

    def _sync(self, records: Iterable[TrialRecord]) -> None:
        for record in records:
            if self._tracker.known(record.number) == (record.fingerprint, record.state):
                continue
            ended = times(record)[1]
            self._last = max(self._last, ended)
            self._record(record)
            self._end(record.number, record.state, record, [], ended)

    def _record(self, record: TrialRecord) -> None:
        """Open a run for a trial that trained elsewhere or earlier, with its whole curve, at the times it had."""
        began, ended = times(record)
        self._start(record.number, self.describe(record), began)
        for entry in record.curve or [{"tokens": tokens, "valid_loss": loss} for tokens, loss in record.points()]:
            seconds = entry.get("seconds")
            at = ended if seconds is None else min(ended, ended - record.seconds + seconds)
            self._tracker.log(record.number, measured(entry), int(entry.get("tokens", 0)), at)


def trial_facts(record: TrialRecord) -> RunFacts:
    """Return what trackers show of a trial by its record alone: architecture, costs, choices and seed."""
    own = {"pattern": record.pattern, "fingerprint": record.fingerprint, "preset": record.preset}
    params = {**own, "seed": record.seed, "lr": record.lr, **record.cost, "choices": dict(record.choices)}
    return RunFacts(params=texts(params), tags=texts(own))


def times(record: TrialRecord) -> tuple[float, float]:
    """Return when a trial began and ended [Unix time, s]; of a record that does not say when, it ends now."""
    ends = [end for end, _ in record.legs]
    if not ends:
        now = time.time()
        return now - record.seconds, now
    total = sum(tokens for _, tokens in record.legs)
    first = record.seconds * (record.legs[0][1] / total if total else 1.0)
    return ends[0] - first, ends[-1]


def measured(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one evaluation: without its place on the axis, extras by their own names."""
    found = numbers({name: value for name, value in values.items() if name not in ("tokens", "step")})
    return {name.removeprefix("aux."): value for name, value in found.items()}


def _scores(record: TrialRecord) -> dict[str, float]:
    """Return a trial's final figures: the objectives, what was measured on this machine, and confirmed means."""
    found = {**record.figures, **record.objectives, "tokens_per_second": record.tokens_per_second}
    for measured_anyway in ("val_loss", "accuracy"):
        found.pop(measured_anyway, None)
    for name in SEED_RESULTS:
        seeds = [value for value in getattr(record, name).values() if value is not None]
        if seeds:
            found |= {f"{name}_mean": sum(seeds) / len(seeds), f"{name}_seeds": float(len(seeds))}
    return {name: value for name, value in found.items() if value is not None}


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


def texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Return nested values as flat masked texts; None is left out, as an absent parameter."""
    return {name: str(value) for name, value in flatten(masked(values)).items() if value not in (None, {})}
