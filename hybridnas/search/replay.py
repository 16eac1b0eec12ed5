"""Train a trial of a study again and compare the new losses with the recorded ones."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hybridnas.data import open_source, source_config
from hybridnas.errors import StudyError
from hybridnas.plugins import require
from hybridnas.search.config import Budget
from hybridnas.search.runner import rebuild
from hybridnas.search_spaces.space import Space
from hybridnas.study.folder import read_study
from hybridnas.study.records import FAIL, RESULT, TrialRecord, read_record, trial_folder
from hybridnas.train.callbacks import Action, Callback, OnEval
from hybridnas.train.experiment import Cell, run_cell
from hybridnas.train.records import Eval, TrainResult, read_run


@dataclasses.dataclass(frozen=True)
class Replay:
    """A trial run again: what was recorded, what came out, and where the weights lie."""

    record: TrialRecord
    result: TrainResult
    folder: Path

    @property
    def evals(self) -> list[Eval]:
        """The measurements of the rerun."""
        return self.result.evals

    @property
    def pairs(self) -> list[tuple[int, float, float]]:
        """(training tokens, recorded loss, loss of the rerun) where both were measured."""
        again = {value.tokens: value.valid_loss for value in self.evals}
        return [(int(t), loss, again[int(t)]) for t, loss in self.record.points() if int(t) in again]

    @property
    def identical(self) -> bool:
        """Whether every recorded loss came out again to the bit."""
        return len(self.pairs) == len(self.record.points()) and all(old == new for _, old, new in self.pairs)


def replay(
    study: Path,
    number: int,
    *,
    out: Path | None = None,
    device: str = "auto",
    callbacks: Iterable[Callback] = (),
    note: Callable[[str], None] | None = None,
) -> Replay:
    """Train a trial's architecture again with the study's seed, data and settings, up to where the trial ended.

    On a processor with the same number of threads the losses are the recorded ones to the bit; the weights end in
    ``out``. A trial that failed fails again, and the result says why. Raises StudyError for a trial that was never
    trained, for data that is not what the study read, and for a plugin of the study that is not loaded or has changed.
    """
    meta = read_study(study)
    require(meta["identity"])
    if (meta["identity"].get("space") or {}).get("table"):
        raise StudyError(
            f"study {study} looked its scores up in a table and trained nothing, so nothing can be replayed; train an "
            f"architecture of it with python -m hybridnas.train",
            field="study",
            got=str(study),
        )
    if not (trial_folder(study, number) / RESULT).is_file():
        rebuild(study, number)  # raises with the trials that there are, unless this one is being trained
    record = read_record(trial_folder(study, number))
    if record.duplicate_of is not None:
        number = record.duplicate_of
        record = read_record(trial_folder(study, number))
    arch = rebuild(study, number)
    identity = meta["identity"]
    with _standing_in(meta.get("directory")):
        source = open_source(source_config(identity["data"]))
    if meta.get("data_fingerprint") not in (None, source.fingerprint):
        raise StudyError(
            f"study {study} was searched on other data than {source.describe()!r} is now: its losses cannot come out "
            f"again; bring back the files that it read"
        )
    if note is not None:
        note(
            f"trial {number}, {record.pattern}, {record.tokens:,} tokens; recorded on {meta.get('machine', 'unknown')}"
        )
    budget = Budget.from_dict(identity["budget"])
    target = Space.from_mapping(identity["space"]).target(budget.scale(source.vocab_size))
    folder = _fresh(out, study / "replays" / f"{number:04d}")
    until = math.inf if record.state == FAIL else record.tokens
    end = OnEval(lambda value: Action.STOP if value.tokens >= until else Action.CONTINUE)
    config = budget.train_config(target, identity["seed"])
    with _threads_of(trial_folder(study, number)):
        cell = Cell(
            key=folder.name,
            model=arch,
            source=source,
            config=config if record.lr is None else config.replace(lr=record.lr),
            folder=folder,
            device=device,
        )
        result = run_cell(cell, callbacks=[end, *callbacks])
    return Replay(record, result, folder)


@contextlib.contextmanager
def _standing_in(directory: str | None) -> Iterator[None]:
    """Change to the folder in which the study was begun, where it still exists: its data's paths may be relative."""
    before = Path.cwd()
    if directory is not None and Path(directory).is_dir():
        os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _threads_of(folder: Path) -> Iterator[None]:
    """Compute with as many threads as the trial did: one of several workers has only its share of the processor."""
    import torch

    stored = read_run(folder)
    found = re.search(r"(\d+) threads?\b", stored.get("machine", "") if stored is not None else "")
    before = torch.get_num_threads()
    if found:
        torch.set_num_threads(int(found[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fresh(out: Path | None, usual: Path) -> Path:
    """Return a folder without a finished run, whose stored losses would be shown in place of new ones."""
    folder = out or usual
    stored = read_run(folder)
    if stored is None or not stored["final"]:
        return folder
    if out is not None:
        raise StudyError(f"{out} holds a finished run; give out=FOLDER another one, or delete it")
    shutil.rmtree(folder)
    return folder
