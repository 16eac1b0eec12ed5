"""A study's folder: one search command at a time writes it, what it is about is written in it, and nothing is lost.

::

    runs/STUDY/journal.log      Optuna's journal, the truth about trials
    runs/STUDY/study.json       what is searched, with which settings, on which machine
    runs/STUDY/trials/0007/     arch.json, metrics.jsonl, result.json, checkpoint
    runs/STUDY/.lock, .leases/  who works here: locks that die with their process
    runs/STUDY/mlflow.db        the mirror in MLflow
    runs/STUDY/report.html, leaderboard.csv, best/
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.files import write_json
from hybridnas.search.storage.journal import repair_tail
from hybridnas.search.storage.leases import FileLock

FORMAT = 1


class StudyFolder:
    """The folder of one study, held by a lock while it is open."""

    def __init__(self, runs: Path, name: str) -> None:
        if not name or any(c in name for c in "/\\") or name.startswith("."):
            raise StudyError(f"study={name!r} must be a plain folder name, without slashes and not starting with a dot")
        self.path = runs / name
        self.name = name
        self.token = ""  # what a worker of this command shows to be let in
        self._lock: Any = None

    def open(self, identity: Mapping[str, Any], facts: Mapping[str, Any], *, shared: bool = False) -> dict[str, Any]:
        """Create or reopen the folder; raises StudyError when it is busy or holds a study of something else.

        ``shared``: other workers, each its own command, may be in it, too; nobody else may.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "trials").mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"study folder {self.path} cannot be made: {error.strerror or error}") from None
        self._acquire(shared)
        try:
            if not shared:
                return self._read_or_make(identity, facts)
            making = FileLock(self.path / ".study.lock")
            making.acquire()
            try:
                return self._read_or_make(identity, facts)
            finally:
                making.release()
        except BaseException:
            self.close()
            raise

    def join(self, token: str) -> dict[str, Any]:
        """Enter as a worker of the command that holds the folder; raises StudyError when that one has ended."""
        try:
            holder = json.loads((self.path / ".lock").read_text())["token"]
        except (OSError, ValueError, KeyError, TypeError):
            holder = ""
        if not token or holder != token:
            raise StudyError(f"study {self.name!r} is no longer held by the command that started this worker")
        return read_study(self.path)

    def alone(self) -> bool:
        """Turn a shared hold into the only one; False, and nothing held, where other workers are still here."""
        try:
            _lock_file(self._lock, shared=False)
        except OSError:
            self.close()
            return False
        return True

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
        difference = first_difference(meta["identity"], identity)
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
        # Optuna's own locks, of a version that used them or of another tool that died; ours is .journal.lock.
        for stale in self.path.glob("journal.log.lock*"):
            stale.unlink(missing_ok=True)
        if path.exists():
            writing = FileLock(self.path / ".journal.lock")
            writing.acquire()
            try:
                repair_tail(path)
                _check_lines(path)
            finally:
                writing.release(keep=True)
        return path

    def limits(self, meta: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Note the limits of the present call, which may differ from call to call."""
        meta = {**meta, "limits": dict(values)}
        write_json(self.path / "study.json", meta)
        return meta

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _acquire(self, shared: bool) -> None:
        try:
            handle = (self.path / ".lock").open("a+")
        except OSError as error:
            raise StudyError(f"study folder {self.path} cannot be written: {error.strerror or error}") from None
        try:
            _lock_file(handle, shared=shared)
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
        if not shared:
            self.token = secrets.token_hex(16)
            handle.truncate(0)
            handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": self.token}))
            handle.flush()


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


def _lock_file(handle: Any, *, shared: bool) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


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


def first_difference(stored: Any, asked: Any, where: str = "") -> str:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted({**stored, **asked}, key="name".__ne__):  # what things are called says most, so it is first
            place = f"{where}.{key}" if where else str(key)
            if key not in stored or key not in asked:
                return f"{place} is {stored.get(key)!r} there and {asked.get(key)!r} here"
            found = first_difference(stored[key], asked[key], place)
            if found:
                return found
        return ""
    return "" if stored == asked else f"{where} is {stored!r} there and {asked!r} here"
