"""The cache on disk: whole folders and files appear at once or not at all, and one process builds for all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridnas.errors import DataError
from hybridnas.files import lock_file


@contextlib.contextmanager
def explaining_disk(folder: Path) -> Iterator[None]:
    """Turn a full or refusing disk into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left for tokenised data in {folder}; free some, or set data.cache_dir to another disk"
            ) from None
        raise DataError(
            f"cannot write tokenised data to {folder} ({error.strerror or error}); "
            f"set data.cache_dir or the environment's HYBRIDNAS_CACHE to a folder that can be written"
        ) from None


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Hold ``path.lock`` while building and yield whether it is held; the system frees it when the holder dies.

    Where the file system knows no locks two processes may both build: wasteful, but harmless where each builds under a
    name of its own, because a folder is published by one rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.lock").open("a") as handle:
        held = False
        with contextlib.suppress(OSError):
            held = lock_file(handle)
            for leftover in path.parent.glob(f"{path.name}.tmp-*"):  # of a builder that was killed: we hold its lock
                remove(leftover)
        yield held


def temporary(path: Path) -> Path:
    """Return a name beside ``path``, so on its file system, that nobody else uses."""
    return path.parent / f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish_folder(built: Path, final: Path) -> None:
    """Give a finished folder its name in one step; a sound folder of that name that came first is kept."""
    for file in built.rglob("*"):
        if file.is_file():
            _sync(file)
    try:
        built.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        remove(built)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _sync(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())
