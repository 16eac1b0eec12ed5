"""Where Optuna keeps a study: a journal in the folder, whose lock dies with its holder, or a database for all hosts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.search.storage.leases import FileLock

if TYPE_CHECKING:
    from optuna.storages import JournalStorage


class JournalLock:
    """Optuna's lock around one append, as a ``flock``.

    Optuna's own locks are files that a killed holder leaves behind: everybody then waits 30 s before one is broken.
    And whoever dies in mid-write leaves half a line, to which the next would append: it is cut off here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.with_name(".journal.lock"))

    def acquire(self) -> bool:
        """Wait for the lock and leave the journal with a whole last line."""
        self._lock.acquire()
        try:
            repair_tail(self._path)
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let the next one write."""
        self._lock.release(keep=True)


def open_journal(path: Path) -> JournalStorage:
    """Open the study's journal for reading and writing beside other processes."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.storages.journal._file import BaseJournalFileLock

    class Lock(JournalLock, BaseJournalFileLock):
        pass

    return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock(path)))


def repair_tail(path: Path) -> None:
    """Cut a last line without its end: its process died while writing it, and appending would join two lines."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)


def close_storage(storage: Any) -> None:
    """Give back what a storage holds open."""
    engine = getattr(getattr(storage, "_backend", storage), "engine", None)
    if engine is not None:
        engine.dispose()
