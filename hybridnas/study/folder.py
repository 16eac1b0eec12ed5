"""A study's folder: one search command at a time writes it, and what the study is about is written in it.

::

    runs/STUDY/study.json       what is searched, with which settings, on which machine
    runs/STUDY/trials/0007/     arch.json, metrics.jsonl, result.json (the trial's record), checkpoint
    runs/STUDY/.lock, .leases/  which processes work here: locks that die with their process
    runs/STUDY/mlflow.db        MLflow's tables, made from the records
    runs/STUDY/journal.log      a journal for optuna-dashboard, made from the records
    runs/STUDY/report.html, leaderboard.csv, best/
"""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.files import lock_file, locked, write_json

FORMAT = 2
READABLE = (1, 2)  # 1: version 0.1, whose truth about unfinished trials was Optuna's journal
REPORT = "report.html"


class StudyFolder:
    """The folder of one study, held by a lock while it is open."""

    def __init__(self, runs: Path, name: str) -> None:
        if not name or any(c in name for c in "/\\") or name.startswith("."):
            raise StudyError(
                f"study={name!r} must be a plain folder name, without slashes and not starting with a dot",
                field="study",
                got=name,
                allowed="a plain folder name",
            )
        self.path = runs / name
        self.name = name
        self.token = ""  # what a worker of this command shows to be let in
        self._lock: Any = None

    def open(self, identity: Mapping[str, Any], facts: Mapping[str, Any], *, shared: bool = False) -> dict[str, Any]:
        """Create or reopen the folder; raises StudyError when it is busy or holds a study of something else.

        ``shared``: other workers, each its own command, may be in it, too; no other process may.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "trials").mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"study folder {self.path} cannot be made: {error.strerror or error}") from None
        self._acquire(shared)
        try:
            with locked(self.path / ".study.lock"):
                return self._read_or_make(identity, facts)
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

    def admit_workers(self) -> None:
        """Write into ``.lock`` who holds the folder, with the token that this command's workers show to :meth:`join`.

        Called once everything has been checked, so that a command that is refused leaves the file as it was.
        """
        self.token = secrets.token_hex(16)
        self._lock.truncate(0)
        self._lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": self.token}))
        self._lock.flush()

    def alone(self) -> bool:
        """Turn a shared hold into the only one; False, and nothing held, where other workers are still here."""
        if not lock_file(self._lock, wait=False):
            self.close()
            return False
        return True

    def _read_or_make(self, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        meta_path = self.path / "study.json"
        identity = json.loads(json.dumps(identity))  # as it reads back: tuples are lists
        if not meta_path.exists():
            if self._begun() or (self.path / "journal.log").exists():
                raise StudyError(
                    f"study folder {self.path} has trials but no study.json; put it back, or choose study=NEWNAME",
                    field="study",
                    got=self.name,
                )
            meta = {"format": FORMAT, "study": self.name, "identity": identity, "created": time.time(), **facts}
            write_json(meta_path, meta)
            return meta
        meta = read_study(self.path)
        if meta["format"] != FORMAT:
            raise StudyError(
                f"study folder {self.path} was made by hybridnas 0.1: its report, its models and replay are read as "
                f"they are, but no search goes on in it; choose study=NEWNAME",
                field="format",
                got=meta["format"],
                allowed=FORMAT,
            )
        difference = first_difference(meta["identity"], identity)
        if difference and not self._begun():  # a first call that went wrong leaves nothing to be kept
            meta_path.unlink()
            return self._read_or_make(identity, facts)
        if difference.field == "data.test_fraction" and difference.stored is None:
            raise StudyError(
                f"study folder {self.path} was begun when data had no test part and copies of training text were "
                f"measured, so its trials cannot be compared with new ones: its report and its models are read as "
                f"they are, but no search goes on in it; choose study=NEWNAME",
                field=difference.field,
                got=difference.asked,
                allowed=None,
            )
        if difference:
            raise StudyError(
                f"study folder {self.path} holds another study: {difference}; "
                f"choose study=NEWNAME, or the same settings to go on",
                field=difference.field,
                got=difference.asked,
                allowed=difference.stored,
            )
        return meta

    def _begun(self) -> bool:
        """Whether any trial has left something."""
        return next((self.path / "trials").iterdir(), None) is not None

    def add_facts(self, meta: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write facts that are known only after opening; raises StudyError when a stored one differs."""
        for name, value in facts.items():
            if meta.get(name, value) != value:
                raise StudyError(
                    f"study folder {self.path} was begun with another {name.replace('_', ' ')}, so its trials "
                    f"cannot be compared with new ones; bring back what it read, or choose study=NEWNAME",
                    field=name,
                    got=value,
                    allowed=meta[name],
                )
        meta = {**meta, **facts}
        write_json(self.path / "study.json", meta)
        return meta

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def keep(self, **values: Any) -> dict[str, Any]:
        """Note facts of the present call, which may differ from call to call; returns what study.json then holds."""
        with locked(self.path / ".study.lock"):
            meta = {**read_study(self.path), **json.loads(json.dumps(values))}
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
            taken = lock_file(handle, wait=False, shared=shared)
        except OSError as error:
            handle.close()
            raise StudyError(
                f"study folder {self.path} lies on a file system without locks ({error.strerror or error}); "
                f"choose another with runs=FOLDER"
            ) from None
        if not taken:
            handle.close()
            raise StudyError(
                f"study {self.name!r} is being written by another process; wait for it, or choose study=NEWNAME",
                field="study",
                got=self.name,
            )
        self._lock = handle


def completed(path: Path) -> Path:
    """Return a path, a study's name in it completed where it is the beginning of the name of one study alone.

    ``runs/mamba_moe-laptop/best`` is ``runs/mamba_moe-laptop-3f2a/best``; a path that exists, or that no study's name
    begins with, is returned as it is. Raises StudyError that lists the names where several begin so.
    """
    for place in (path, *path.parents):
        if place.exists() or not place.name:
            break
        if not place.parent.is_dir():
            continue
        found = place.parent.glob(f"{glob.escape(place.name)}*/study.json")
        name = full_name(place.name, (card.parent.name for card in found))
        if name is not None:
            return place.parent / name / path.relative_to(place)
    return path


def full_name(name: str, studies: Iterable[str]) -> str | None:
    """Return the study of that name, or whose name begins so: the one that lacks the hash alone before others.

    None where there is none; raises StudyError that lists them where several begin so.
    """
    names = sorted(study for study in studies if study.startswith(name))
    if name in names:
        return name
    usual = [study for study in names if re.fullmatch(r"-[0-9a-f]{4,8}", study[len(name) :])]
    fitting = usual if len(usual) == 1 else names
    if len(fitting) > 1:
        raise StudyError(
            f"no study is called {name!r}, and {len(fitting)} names begin so: {', '.join(fitting)}; give one of them",
            field="study",
            got=name,
            allowed=tuple(fitting),
        )
    return fitting[0] if fitting else None


def read_study(path: Path) -> dict[str, Any]:
    """Return a study folder's study.json; raises StudyError when there is none, or one that is not ours."""
    file = path / "study.json"
    if not file.is_file():
        names = sorted(p.parent.name for p in path.parent.glob("*/study.json")) if path.parent.is_dir() else []
        known = f"; studies there: {', '.join(names)}" if names else "; run python -m hybridnas.search first"
        raise StudyError(f"no study in {path}{known}")
    try:
        meta = json.loads(file.read_text())
        if meta["format"] not in READABLE:
            raise StudyError(
                f"{file} has format {meta['format']}, this version reads {' and '.join(map(str, READABLE))}; use the "
                f"version it is of",
                field="format",
                got=meta["format"],
                allowed=READABLE,
            )
        _ = meta["identity"], meta["study"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise StudyError(f"{file} is damaged; restore it, or start again with study=NEWNAME") from None
    return dict(meta)


@dataclass(frozen=True)
class Difference:
    """Where two sets of settings differ first; false where they agree."""

    field: str = ""  # dotted
    stored: Any = None
    asked: Any = None

    def __bool__(self) -> bool:
        return bool(self.field)

    def __str__(self) -> str:
        return f"{self.field} is {self.stored!r} there and {self.asked!r} here" if self.field else ""


def first_difference(stored: Any, asked: Any, where: str = "") -> Difference:
    """Return the first setting, the deepest one, in which stored settings differ from those that are asked for."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for key in sorted({**stored, **asked}, key="name".__ne__):  # a name tells most, so it comes first
            place = f"{where}.{key}" if where else str(key)
            if key not in stored or key not in asked:
                return Difference(place, stored.get(key), asked.get(key))
            found = first_difference(stored[key], asked[key], place)
            if found:
                return found
        return Difference()
    return Difference() if stored == asked else Difference(where, stored, asked)
