"""Locks between processes of one host: one holder at most, released by the kernel when it ends, however it ends.

A lock is ``flock`` on a file (``msvcrt.locking`` on Windows). Nothing has to be timed out and nothing is left behind
that has to be broken. Network file systems do not keep this promise everywhere: across hosts a study needs a database.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from hybridnas.files import lock_file


class FileLock:
    """A lock on a path. The file exists while it is held, or after its holder has died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._file is not None

    def acquire(self, *, wait: bool = True, note: Mapping[str, Any] | None = None) -> bool:
        """Take the lock and write ``note`` into the file; False where another holds it and ``wait`` is False."""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+")
            try:
                taken = lock_file(file, wait=wait)
            except BaseException:
                file.close()
                raise
            if not taken:
                file.close()
                return False
            if not self._is_current(file):  # the holder removed the file while we waited for it
                file.close()
                continue
            self._file = file
            if note is not None:
                file.truncate(0)
                file.write(json.dumps(note))
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
                with contextlib.suppress(PermissionError):  # Windows removes no open file; it is harmless there
                    self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def note(self) -> dict[str, Any]:
        """Return what the present or the last holder wrote."""
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at ``path``; nothing is changed."""
    if not path.exists():
        return False
    try:
        with path.open("a+") as file:
            return not lock_file(file, wait=False, shared=True)
    except OSError:
        return False
