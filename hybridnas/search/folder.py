"""A study's folder: one process at a time writes it, what it is about is written in it, and nothing in it is lost.

::

    runs/STUDY/journal.log      Optuna's journal, the truth about trials
    runs/STUDY/study.json       what is searched, with which settings, on which machine
    runs/STUDY/trials/0007/     arch.json, metrics.jsonl, result.json, checkpoint
    runs/STUDY/mlflow.db        the mirror in MLflow
    runs/STUDY/report.html, leaderboard.csv, best/
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.files import write_json

FORMAT = 1


class StudyFolder:
    """The folder of one study, held by a lock while it is open."""

    def __init__(self, runs: Path, name: str) -> None:
        if not name or any(c in name for c in "/\\") or name.startswith("."):
            raise StudyError(f"study={name!r} must be a plain folder name, without slashes and not starting with a dot")
        self.path = runs / name
        self.name = name
        self._lock: Any = None

    def open(self, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Create or reopen the folder; raises StudyError when it is busy or holds a study of something else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "trials").mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"study folder {self.path} cannot be made: {error.strerror or error}") from None
        self._acquire()
        try:
            return self._read_or_make(identity, facts)
        except BaseException:
            self.close()
            raise

    def _read_or_make(self, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        meta_path = self.path / "study.json"
        identity = json.loads(json.dumps(identity))  # as it reads back: tuples are lists
        if not meta_path.exists():
            if (self.path / "journal.log").exists():
                raise StudyError(f"study folder {self.path} has a journal but no study.json; choose study=NEWNAME")
            meta = {"format": FORMAT, "study": self.name, "identity": identity, "created": time.time(), **facts}
            write_json(meta_path, meta)
            return meta
        meta = read_study(self.path)
        difference = _first_difference(meta["identity"], identity)
        if difference and not self._begun():  # a first call that went wrong leaves nothing to be kept
            (self.path / "journal.log").unlink(missing_ok=True)
            meta_path.unlink()
            return self._read_or_make(identity, facts)
        if difference:
            raise StudyError(
                f"study folder {self.path} holds another study: {difference}; "
                f"choose study=NEWNAME, or the same settings to go on"
            )
        return meta

    def _begun(self) -> bool:
        """Whether any trial has left something."""
        return next((self.path / "trials").iterdir(), None) is not None

    def add_facts(self, meta: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write facts that are known only after opening; raises StudyError when a stored one says otherwise."""
        for name, value in facts.items():
            if meta.get(name, value) != value:
                raise StudyError(
                    f"study folder {self.path} was begun with another {name.replace('_', ' ')}, so its trials "
                    f"cannot be compared with new ones; bring back what it read, or choose study=NEWNAME"
                )
        meta = {**meta, **facts}
        write_json(self.path / "study.json", meta)
        return meta

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def journal(self) -> Path:
        """Return the journal's path, repaired after a death in mid-write; raises StudyError for a corrupt line."""
        path = self.path / "journal.log"
        # Whoever held these died with the folder lock, which is now ours.
        for stale in self.path.glob("journal.log.lock*"):
            stale.unlink(missing_ok=True)
        if path.exists():
            _repair_tail(path)
            _check_lines(path)
        return path

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self) -> None:
        try:
            handle = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StudyError(f"study folder {self.path} cannot be written: {error.strerror or error}") from None
        try:
            _lock_file(handle)
        except (BlockingIOError, PermissionError):  # what flock and msvcrt say of a lock that is held
            handle.close()
            raise StudyError(
                f"study {self.name!r} is being written by another process; wait for it, or choose study=NEWNAME"
            ) from None
        except OSError as error:
            handle.close()
            raise StudyError(
                f"study folder {self.path} lies on a file system without locks ({error.strerror or error}); "
                f"choose another with runs=FOLDER"
            ) from None
        self._lock = handle


def read_study(path: Path) -> dict[str, Any]:
    """Return a study folder's study.json; raises StudyError when there is none, or one that is not ours."""
    file = path / "study.json"
    if not file.is_file():
        names = sorted(p.parent.name for p in path.parent.glob("*/study.json")) if path.parent.is_dir() else []
        known = f"; studies there: {', '.join(names)}" if names else "; run python -m hybridnas.search first"
        raise StudyError(f"no study in {path}{known}")
    try:
        meta = json.loads(file.read_text())
        if meta["format"] != FORMAT:
            raise StudyError(
                f"{file} has format {meta['format']}, this version reads {FORMAT}; use the version it is of"
            )
        _ = meta["identity"], meta["study"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise StudyError(f"{file} is damaged; restore it, or start again with study=NEWNAME") from None
    return dict(meta)


def _lock_file(handle: Any) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _repair_tail(path: Path) -> None:
    """Cut a last line without its end: the process died while writing it, and appending would join two lines."""
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


def _check_lines(path: Path) -> None:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                whole = "op_code" in json.loads(line)
            except (ValueError, TypeError):
                whole = False
            if not whole:  # without it, all later lines would count their trials wrongly
                raise StudyError(
                    f"journal {path} is damaged at line {number}; put back a copy of it, or choose study=NEWNAME "
                    f"(the results in {path.parent / 'trials'} are not touched)"
                )


def _first_difference(stored: Any, asked: Any, where: str = "") -> str:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted({**stored, **asked}, key="name".__ne__):  # what things are called says most, so it is first
            place = f"{where}.{key}" if where else str(key)
            if key not in stored or key not in asked:
                return f"{place} is {stored.get(key)!r} there and {asked.get(key)!r} here"
            found = _first_difference(stored[key], asked[key], place)
            if found:
                return found
        return ""
    return "" if stored == asked else f"{where} is {stored!r} there and {asked!r} here"
