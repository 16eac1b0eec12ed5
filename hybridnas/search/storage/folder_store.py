"""Records in a study's folder: one file for each trial, and locks that die with the process that holds them.

For workers of one host. Every hold is a lock on a small file in ``STUDY/.leases``; the kernel releases it when the
process ends, however it ends, so nothing has to be timed out.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hybridnas.errors import StudyError
from hybridnas.files import locked
from hybridnas.search.storage.store import Held
from hybridnas.study.locks import FileLock, is_held
from hybridnas.study.records import RESULT, RUNNING, TrialRecord, read_record, trial_folder, write_record

LEASES = ".leases"


class FolderStore:
    """The records of one study's folder, as one of its processes sees them."""

    def __init__(self, folder: Path, worker: int = 0) -> None:
        self.folder = folder
        self.worker = worker
        self.warnings: list[str] = []  # one sentence for each file that cannot be read
        self._held: dict[int, FileLock] = {}
        self._seen: dict[str, tuple[int, int]] = {}  # folder's name -> inode and time of its file, as last read
        self._records: dict[int, TrialRecord] = {}

    @contextmanager
    def deciding(self) -> Iterator[None]:
        with locked(self.folder / LEASES / "decide"):
            yield

    def changes(self) -> list[TrialRecord]:
        found: dict[int, TrialRecord] = {}
        trials = self.folder / "trials"
        for name in self._names():
            try:
                facts = os.stat(f"{trials}/{name}/{RESULT}")  # noqa: PTH116 as text: a Path costs ten times the call
                version = (facts.st_ino, facts.st_mtime_ns)
                if self._seen.get(name) == version:
                    continue
                path = trials / name / RESULT
                record = read_record(path.parent)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except StudyError as error:
                self._seen[name] = version
                self.warnings.append(f"skipped a trial: {error}")
                continue
            self._seen[name] = version
            if path.parent != trial_folder(self.folder, record.number):
                self.warnings.append(f"skipped a trial: {path} repeats the number {record.number}")
                continue
            if self._records.get(record.number) != record:
                self._records[record.number] = found[record.number] = record
        return [found[number] for number in sorted(found)]

    def _names(self) -> list[str]:
        """Return the names of the folders of trials in order."""
        try:
            return sorted(os.listdir(self.folder / "trials"))  # noqa: PTH208 names alone: ten times faster
        except FileNotFoundError:
            return []

    def next_number(self) -> int:
        """Return one more than the highest number of a record, readable or not."""
        trials = self.folder / "trials"
        numbered = sorted(((int(name), name) for name in self._names() if name.isdigit()), reverse=True)
        return 1 + next((number for number, name in numbered if (trials / name / RESULT).exists()), -1)

    def begin(self, record: TrialRecord) -> bool:
        if not self.hold(record.number):
            return False
        if not self._is_current(record.number):  # its worker wrote the end and let go since we looked
            self.release(record.number)
            return False
        self.save(record)
        return True

    def hold(self, number: int) -> bool:
        """Take a trial's lock until :meth:`release`; False where another process has it."""
        lock = FileLock(lease(self.folder, number))
        note = {"pid": os.getpid(), "host": socket.gethostname(), "worker": self.worker, "since": time.time()}
        if number in self._held:
            return True
        if not lock.acquire(wait=False, note=note):
            return False
        self._held[number] = lock
        return True

    def _is_current(self, number: int) -> bool:
        """Whether a trial's file is as it was when it was last read."""
        folder = trial_folder(self.folder, number)
        try:
            facts = (folder / RESULT).stat()
        except FileNotFoundError:
            return folder.name not in self._seen
        return self._seen.get(folder.name) == (facts.st_ino, facts.st_mtime_ns)

    def save(self, record: TrialRecord) -> None:
        write_record(trial_folder(self.folder, record.number), record)

    def release(self, number: int) -> None:
        lock = self._held.pop(number, None)
        if lock is not None:
            lock.release()

    def orphans(self) -> list[int]:
        return [held.record.number for held in self.running() if not held.where]

    def running(self) -> list[Held]:
        found = []
        for number, record in sorted(self._records.items()):
            if record.state == RUNNING:
                where = "this process" if number in self._held else _where(lease(self.folder, number))
                found.append(Held(record, where))
        return found

    def close(self) -> None:
        for lock in self._held.values():
            lock.release()
        self._held = {}


def lease(folder: Path, number: int) -> Path:
    """Return the file whose lock is held while a process works on the trial."""
    return folder / LEASES / f"trial-{number:04d}"


def _where(path: Path) -> str:
    """Return which process holds a lease, as text; empty where none does."""
    if not is_held(path):
        return ""
    note = FileLock(path).note()
    return f"worker {note.get('worker', 0)}, process {note.get('pid', '?')} on {note.get('host', '?')}"
