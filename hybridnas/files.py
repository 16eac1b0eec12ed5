"""Atomic file writes (temporary file, sync, rename), locks on files, and the folder of the cache."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_POLL_SECONDS = 0.05  # between tries on Windows, whose locks cannot be waited for
_UMASK = os.umask(0)  # can only be read by setting it, which other threads would see: so once, at import
os.umask(_UMASK)


def cache_home() -> Path:
    """Return the folder of shards, tokenizers and compiled kernels: HYBRIDNAS_CACHE, or hybridnas in XDG's cache."""
    chosen = os.environ.get("HYBRIDNAS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hybridnas"


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace ``path`` by ``data`` so that a reader or a crash sees the old file or the new one.

    ``sync``: wait until the disk has it; without, a power failure may leave an empty file, so only for what is kept
    elsewhere.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_UMASK)  # mkstemp makes private files; a study is shared like any other file
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write UTF-8 text atomically; ``sync`` as :func:`write_atomic`."""
    write_atomic(path, text.encode(), sync=sync)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; not-a-number and infinity are refused, because JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV with these columns and a line for each row atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def lock_file(file: IO[Any], *, wait: bool = True, shared: bool = False) -> bool:
    """Lock an open file until it is closed; False where another process holds it and ``wait`` is False.

    ``shared``: beside other shared holders (on Windows alone, as one of its own). Raises OSError on a file system
    without locks.
    """
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                return True
            except PermissionError:
                if not wait:
                    return False
                time.sleep(_POLL_SECONDS)
    else:
        try:
            import fcntl
        except ImportError as error:  # a Python without it, as on WebAssembly
            raise OSError(errno.ENOSYS, "this system has no file locks") from error
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, shared: bool = False) -> Iterator[bool]:
    """Hold the lock at ``path`` for a block and leave its file; yields False where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        yield lock_file(file, wait=wait, shared=shared)
