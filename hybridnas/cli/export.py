"""python -m hybridnas.export study=NAME out=DIR: a trial of a study, or a model, as a folder of some format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.cli.wanted import generate_command, model_folder, study_folder
from hybridnas.config import option
from hybridnas.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.tokenizers import Tokenizer
    from hybridnas.export.hf.writing import NativeExport
    from hybridnas.studies import Study, Trial


FORMATS = (
    "layout: hybridnas; gguf: a file for llama.cpp; a model_type of transformers, such as nemotron_h; auto: the first "
    "class of transformers that can hold the model"
)


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    study: str | None = option(None, "name of the study, or its folder")
    model: Path | None = option(None, "in place of a study: folder of a model, ours or that of a transformers class")
    out: Path | None = option(None, "folder to write; an earlier export there is replaced")
    format: str = option("hybridnas", FORMATS)
    trial: int | None = option(None, "number of the trial; null: the best of the study", ge=0)
    runs: Path = option(Path("runs"), "folder in which studies lie")

    @classmethod
    def label(cls) -> str:
        return "export"


def run(settings: Settings) -> Done:
    """Export the asked or the best trial, or a model, and say where it is and what it is."""
    if not (settings.study or settings.model) or not settings.out:
        missing = "out" if settings.study or settings.model else "study"
        raise ConfigError(
            "export needs study=NAME and out=DIR, e.g. study=mamba_moe-laptop out=model, or model=DIR and out=DIR",
            field=missing,
        )
    if settings.model:
        if settings.study or settings.trial is not None:
            raise ConfigError(
                f"give model={settings.model} or a trial of a study, not both", field="model", got=settings.model
            )
        return _export_model(settings.model, settings.out, settings.format)
    from hybridnas.studies import load_study

    assert settings.study is not None
    study = load_study(study_folder(settings.study, settings.runs))
    trial = study.best if settings.trial is None else _trial(study, settings.trial)
    record = trial.record
    loss = f", loss {record.valid_loss:.4f}" if record.valid_loss is not None else ""
    about = f"trial {record.number}, {record.pattern}{loss}"
    facts = {"trial": record.number, "pattern": record.pattern, "fingerprint": record.fingerprint}
    facts["valid_loss"] = record.valid_loss
    if settings.format == "gguf":
        return _gguf_done(trial.model(), settings.out, study.tokenizer(), about, facts)
    if settings.format != "hybridnas":
        native = trial.export_native(settings.out, format=settings.format)
        return _native_done(native, about, facts)
    folder = trial.export(settings.out)
    show.line(f"{about}: reloaded with equal logits")
    show.line(f"model:  {folder}   {generate_command(Path(folder))}".rstrip())
    return Done({"model": str(folder), "format": settings.format, **facts})


def _export_model(folder: Path, out: Path, format: str) -> Done:
    """Export the model of a folder, ours or that of a transformers class."""
    from hybridnas.data.tokenizers import load_tokenizer
    from hybridnas.export.folder import export
    from hybridnas.export.hf import read
    from hybridnas.export.hf.writing import export_native
    from hybridnas.export.layout import MODEL_TYPE, TOKENIZER_FILES
    from hybridnas.export.load import load, read_config, read_json

    where = model_folder(folder.expanduser())
    content = read_json(where)
    ours = isinstance(content, dict) and content.get("model_type") == MODEL_TYPE
    model = load(where, device="cpu") if ours else read(where)
    card = read_config(where)["training"] if ours else {}
    tokenizer = load_tokenizer(where) if (where / TOKENIZER_FILES[0]).is_file() else None
    facts = {"pattern": str(model.arch.pattern), "fingerprint": model.arch.fingerprint()}
    if format == "hybridnas":
        written = export(model, out, tokenizer=tokenizer, card=card)
        show.line(f"{model.arch.pattern}: reloaded with equal logits")
        show.line(f"model:  {written}")
        return Done({"model": str(written), "format": format, **facts})
    if format == "gguf":
        return _gguf_done(model, out, tokenizer, str(model.arch.pattern), facts)
    native = export_native(model, out, format=format, tokenizer=tokenizer, card=card)
    return _native_done(native, str(model.arch.pattern), facts)


def _gguf_done(model: HybridLM, out: Path, tokenizer: Tokenizer | None, about: str, facts: dict[str, Any]) -> Done:
    from hybridnas.export.gguf import export_gguf

    path, name, without = export_gguf(model, out, tokenizer=tokenizer)
    words = f"without a vocabulary ({without}): it takes and gives token ids" if without else "with its vocabulary"
    show.line(f"{about} as {name} of llama.cpp, float32, {words}")
    show.line(f"model:  {path}")
    return Done({"model": str(path), "format": "gguf", "architecture": name, "vocabulary": not without, **facts})


def _native_done(native: NativeExport, about: str, facts: dict[str, Any]) -> Done:
    assert native.reloaded is not None
    show.line(
        f"{about} as {native.format}: {native.reloaded.class_name} of transformers {native.reloaded.transformers}"
    )
    show.line(native.reloaded.words())
    show.line(f"model:  {native.folder}   transformers.AutoModelForCausalLM.from_pretrained({str(native.folder)!r})")
    return Done({**native.to_dict(), **facts})


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
