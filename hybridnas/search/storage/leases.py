"""Who works on what, where several processes share a study's folder: locks that die with their holder.

Every hold is a ``flock`` on a small file in ``STUDY/.leases``. The kernel lets go of it when the process ends, however
it ends, so nothing has to be timed out: a trial that the journal calls running and nobody holds was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridnas.errors import StudyError
from hybridnas.search.pruning.promotion import candidate_of, continues
from hybridnas.study.records import FAIL, RESULT, TrialRecord, read_record, trial_folder, write_record

try:
    import fcntl
except ImportError:  # Windows: one process at a time, which the study's own lock sees to
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import optuna

LEASES = ".leases"
DEATHS = 5  # so many in a row without a step forward, and the trial itself is what kills its processes


class FileLock:
    """A lock on a path, held by at most one process; the file is there only while somebody holds it or has died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, *, wait: bool = True, words: Mapping[str, Any] | None = None) -> bool:
        """Take the lock and write ``words`` into it; False where another holds it and ``wait`` is False."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.close()
                return False
            except BaseException:
                file.close()
                raise
            if not self._is_current(file):  # the holder took the file away while we waited for it
                file.close()
                continue
            self._file = file
            if words is not None:
                file.truncate(0)
                file.write(json.dumps(words))
                file.flush()
            return True

    def _is_current(self, file: IO[str]) -> bool:
        try:
            here, there = os.fstat(file.fileno()), self.path.stat()
        except FileNotFoundError:
            return False
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def release(self, *, keep: bool = False) -> None:
        """Let go; ``keep`` leaves the file where it is."""
        if self._file is not None:
            if not keep:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def words(self) -> dict[str, Any]:
        """Return what the present or the last holder wrote."""
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}


def held(path: Path) -> bool:
    """Whether a process holds the lock at ``path``; looks without touching."""
    if fcntl is None or not path.exists():
        return False
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Crew:
    """The processes that share a study's folder, as one of them sees it."""

    def __init__(self, folder: Path, worker: int = 0) -> None:
        self.folder = folder
        self.worker = worker
        self._draw = FileLock(folder / LEASES / "draw")
        self._trials: dict[int, FileLock] = {}
        self._archs: dict[int, FileLock] = {}
        self._seen: dict[Path, int] = {}

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Hold the right to choose: one process at a time looks at what there is to do and takes some of it."""
        self._draw.acquire()
        try:
            yield
        finally:
            self._draw.release(keep=True)

    def take(self, study: optuna.Study, number: int) -> bool:
        """Hold a trial until :meth:`done`; False where another process holds it."""
        lock = FileLock(trial_lease(self.folder, number))
        words = {"pid": os.getpid(), "host": socket.gethostname(), "worker": self.worker, "since": time.time()}
        if not lock.acquire(wait=False, words=words):
            return False
        self._trials[number] = lock
        return True

    def adopt(self, study: optuna.Study, paused: Collection[int] = ()) -> optuna.Trial | None:
        """Take one trial that was running when its process died; ``paused`` ones wait on purpose.

        One whose processes died again and again at the same place gets its record here: FAIL, with the reason.
        """
        from optuna.trial import Trial, TrialState

        for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            number = frozen.number
            if number in paused or number in self._trials or not self.take(study, number):
                continue
            trial = Trial(study, frozen._trial_id)
            marks = [*frozen.user_attrs.get("deaths", ()), _progress(self.folder, candidate_of(frozen))]
            trial.set_user_attr("deaths", marks[-DEATHS:])
            if len(marks) >= DEATHS and len(set(marks[-DEATHS:])) == 1:
                self._bury(trial)
            return trial
        return None

    def _bury(self, trial: optuna.Trial) -> None:
        folder = trial_folder(self.folder, candidate_of(trial))
        reason = f"its process died {DEATHS} times in a row at the same place; is the machine's memory too small?"
        if continues(trial) is not None and (folder / RESULT).exists():
            write_record(folder, dataclasses.replace(read_record(folder), state=FAIL, reason=reason))
        if (folder / RESULT).exists():
            return
        known = trial.user_attrs
        record = TrialRecord(
            number=trial.number,
            state=FAIL,
            pattern=known.get("pattern", ""),
            fingerprint=known.get("fingerprint", ""),
            preset=known.get("baseline"),
            choices=dict(trial.params),
            reason=reason,
        )
        write_record(folder, record)

    def claim(self, trial: optuna.Trial, fingerprint: str) -> int | None:
        """Claim an architecture for a trial; returns the number of the trial that trains it already, or None."""
        lock = FileLock(self.folder / LEASES / f"arch-{fingerprint[:24]}")
        if lock.acquire(wait=False, words={"trial": trial.number}):
            self._archs[trial.number] = lock
            return None
        for _ in range(100):
            other = lock.words().get("trial")
            if isinstance(other, int):
                return other
            time.sleep(0.01)  # it has the lock and is about to write its number
        return None

    def running(self, study: optuna.Study, paused: Collection[int] = ()) -> list[int]:
        """Return the numbers of trials that other processes work on."""
        from optuna.trial import TrialState

        now = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [t.number for t in now if t.number not in paused and t.number not in self._trials]

    def publish(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Let others know a record before the study is told; here it lies in the folder already."""

    def done(self, number: int) -> None:
        """Let go of a trial and of its architecture."""
        for held_by_us in (self._archs, self._trials):
            lock = held_by_us.pop(number, None)
            if lock is not None:
                lock.release()

    def refresh(self, study: optuna.Study, records: dict[int, TrialRecord]) -> list[TrialRecord]:
        """Read what others have finished since the last look into ``records``; returns what is new or changed."""
        news: list[TrialRecord] = []
        for path in sorted((self.folder / "trials").glob(f"*/{RESULT}")):
            try:
                written = path.stat().st_mtime_ns
                if self._seen.get(path) == written:
                    continue
                record = read_record(path.parent)
            except (FileNotFoundError, StudyError):
                continue
            self._seen[path] = written
            if records.get(record.number) != record:
                records[record.number] = record
                news.append(record)
        return news

    def close(self) -> None:
        """Let go of everything, leaving the marks of trials that were not finished."""
        for lock in self._trials.values():
            lock.release(keep=True)
        for lock in self._archs.values():
            lock.release()
        self._trials, self._archs = {}, {}


class TrialLostError(StudyError):
    """Another worker has taken over the trial, because this one was silent for too long."""


class Earlier(Mapping[str, TrialRecord]):
    """Finished trials by fingerprint, for one trial that asks for its own: asking claims the architecture."""

    def __init__(self, crew: Crew, study: optuna.Study, trial: optuna.Trial, records: dict[int, TrialRecord]) -> None:
        self._crew, self._study, self._trial, self._records = crew, study, trial, records

    def _finished(self) -> dict[str, TrialRecord]:
        states = ("COMPLETE", "PRUNED", FAIL)
        own = self._trial.number
        return {
            r.fingerprint: r for n, r in sorted(self._records.items(), reverse=True) if r.state in states and n != own
        }

    def __getitem__(self, fingerprint: str) -> TrialRecord:
        found = self._finished().get(fingerprint)
        if found is None:
            other = self._crew.claim(self._trial, fingerprint)
            self._crew.refresh(self._study, self._records)  # it may have been finished a moment ago
            found = self._finished().get(fingerprint)
            if found is None and other is not None:
                return TrialRecord(number=other, state="RUNNING", fingerprint=fingerprint)
        if found is None:
            raise KeyError(fingerprint)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._finished())

    def __len__(self) -> int:
        return len(self._finished())


def trial_lease(folder: Path, number: int) -> Path:
    """Return the file whose lock says that a process works on the trial."""
    return folder / LEASES / f"trial-{number:04d}"


def _progress(folder: Path, number: int) -> str:
    """Return a mark that changes whenever the trial has come further."""
    marks = []
    for name in ("metrics.jsonl", "checkpoint.safetensors"):
        try:
            found = (trial_folder(folder, number) / name).stat()
            marks.append(f"{found.st_size}:{found.st_mtime_ns}")
        except OSError:
            marks.append("-")
    return " ".join(marks)
