"""python -m hybridnas.export study=NAME out=DIR: a trial of a study as a folder that hybridnas.load reads."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.cli.wanted import study_folder
from hybridnas.config import option
from hybridnas.errors import ConfigError, ExportError, StudyError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.tokenizers import Tokenizer
    from hybridnas.study.records import TrialRecord


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    study: str | None = option(None, "name of the study, or its folder")
    out: Path | None = option(None, "folder to write; an earlier export there is replaced")
    trial: int | None = option(None, "number of the trial; null: the completed one of lowest validation loss", ge=0)
    runs: Path = option(Path("runs"), "folder in which studies lie")

    @classmethod
    def label(cls) -> str:
        return "export"


def run(settings: Settings) -> Done:
    """Export the asked or the best trial, and say where it is and what it is."""
    if not settings.study or not settings.out:
        missing = "out" if settings.study else "study"
        raise ConfigError("export needs study=NAME and out=DIR, e.g. study=mamba_moe-laptop out=model", field=missing)
    from hybridnas.export.folder import export
    from hybridnas.export.trials import card_facts
    from hybridnas.search.config import SearchConfig
    from hybridnas.study.folder import read_study
    from hybridnas.study.records import load_records

    study = study_folder(settings.study, settings.runs)
    meta = read_study(study)
    records, warnings = load_records(study)
    for warning in warnings:
        show.line(f"warning: {warning}")
    record = choose(records, settings.trial, str(meta["study"]))
    model = _model(study, record, settings.study)
    card = card_facts(record, str(meta["study"]), SearchConfig.from_dict(meta["identity"]))
    folder = export(model, settings.out, tokenizer=_tokenizer(study, meta["identity"]["data"]), card=card)
    loss = f", loss {record.valid_loss:.4f}" if record.valid_loss is not None else ""
    show.line(f"trial {record.number}, {record.pattern}{loss}: reloaded with equal logits")
    show.line(
        f"model:  {folder}   {shlex.join(['python', '-m', 'hybridnas.generate', f'model={folder}', 'prompt=def '])}"
    )
    found = {"model": str(folder), "trial": record.number, "pattern": record.pattern}
    return Done({**found, "fingerprint": record.fingerprint, "valid_loss": record.valid_loss})


def choose(records: list[TrialRecord], number: int | None, study: str) -> TrialRecord:
    """Return the trial of this number, or the best completed one; raises StudyError when there is none with weights."""
    by_number = {record.number: record for record in records}
    if number is None:
        done = [record for record in records if record.state == "COMPLETE" and record.valid_loss is not None]
        if not done:
            states = ", ".join(f"trial {record.number} {record.state}" for record in records) or "no trial at all"
            raise StudyError(f"study {study!r} has no completed trial to export ({states}); run the search further")
        return min(done, key=lambda record: record.valid_loss or 0.0)
    if number not in by_number:
        known = ", ".join(map(str, by_number)) or "none"
        raise StudyError(
            f"study {study!r} has no finished trial {number}; finished: {known}",
            field="trial",
            got=number,
            allowed=tuple(by_number),
        )
    record = by_number[number]
    if record.state == "DUPLICATE" and record.duplicate_of in by_number:
        show.line(f"trial {number} is the architecture of trial {record.duplicate_of}, which was trained")
        record = by_number[record.duplicate_of]
    if record.state not in ("COMPLETE", "PRUNED"):
        raise StudyError(f"trial {record.number} of study {study!r} has no model: {record.state}, {record.reason}")
    return record


def _model(study: Path, record: TrialRecord, name: str) -> HybridLM:
    """Return the trial's model from its checkpoint, or from ``best/`` where that is this very trial."""
    from hybridnas.export.layout import CONFIG
    from hybridnas.export.load import load, read_config
    from hybridnas.study.records import trial_folder
    from hybridnas.train.checkpoint import load_model

    folder = trial_folder(study, record.number)
    if any(folder.glob("checkpoint*.safetensors")):
        return load_model(folder)
    best = study / "best"
    if (best / CONFIG).is_file():
        config = read_config(best)
        facts = config.get("training") or {}
        if facts.get("trial") == record.number and config.get("fingerprint") == record.fingerprint:
            return load(best, device="cpu")
    again = shlex.join(["python", "-m", "hybridnas.replay", f"study={name}", f"trial={record.number}"])
    raise ExportError(
        f"trial {record.number} of {study} kept no weights (a study keeps those of its best trials); "
        f"{again} trains it again to the same numbers",
        field="trial",
        got=record.number,
    )


def _tokenizer(study: Path, data: dict[str, Any]) -> Tokenizer | None:
    """Return the study's tokenizer: from ``best/``, which needs no corpus, else from the data itself."""
    from hybridnas.data import open_source, source_config
    from hybridnas.export.layout import CONFIG, TOKENIZER_FILES
    from hybridnas.export.load import load_tokenizer

    best = study / "best"
    if (best / CONFIG).is_file() and (best / TOKENIZER_FILES[0]).is_file():
        return load_tokenizer(best)
    return open_source(source_config(data)).tokenizer
