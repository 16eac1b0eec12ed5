"""python -m hybridnas.export study=NAME out=DIR: a trial of a study as a folder that hybridnas.load reads."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.cli.wanted import study_folder
from hybridnas.config import option
from hybridnas.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from hybridnas.studies import Study, Trial


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    study: str | None = option(None, "name of the study, or its folder")
    out: Path | None = option(None, "folder to write; an earlier export there is replaced")
    trial: int | None = option(None, "number of the trial; null: the best of the study", ge=0)
    runs: Path = option(Path("runs"), "folder in which studies lie")

    @classmethod
    def label(cls) -> str:
        return "export"


def run(settings: Settings) -> Done:
    """Export the asked or the best trial, and say where it is and what it is."""
    if not settings.study or not settings.out:
        missing = "out" if settings.study else "study"
        raise ConfigError("export needs study=NAME and out=DIR, e.g. study=mamba_moe-laptop out=model", field=missing)
    from hybridnas.studies import load_study

    study = load_study(study_folder(settings.study, settings.runs))
    trial = study.best if settings.trial is None else _trial(study, settings.trial)
    folder = trial.export(settings.out)
    record = trial.record
    loss = f", loss {record.valid_loss:.4f}" if record.valid_loss is not None else ""
    show.line(f"trial {record.number}, {record.pattern}{loss}: reloaded with equal logits")
    then = shlex.join(["python", "-m", "hybridnas.generate", f"model={folder}", "prompt=def "])
    show.line(f"model:  {folder}   {then}")
    found = {"model": str(folder), "trial": record.number, "pattern": record.pattern}
    return Done({**found, "fingerprint": record.fingerprint, "valid_loss": record.valid_loss})


def _trial(study: Study, number: int) -> Trial:
    """Return the trial of this number, a duplicate's original; raises StudyError with the numbers that there are."""
    trials = {trial.number: trial for trial in study.trials}
    if number not in trials:
        raise StudyError(
            f"study {study.name!r} has no finished trial {number}; finished: {', '.join(map(str, trials)) or 'none'}",
            field="trial",
            got=number,
            allowed=tuple(trials),
        )
    original = trials[number].record.duplicate_of
    if original is None or original not in trials:
        return trials[number]
    show.line(f"trial {number} is the architecture of trial {original}, which was trained")
    return trials[original]
