"""The architecture that ``preset=`` or ``pattern=`` with ``arch.*`` ask for, and the model that ``model=`` names."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.source import SourceConfig
    from hybridnas.data.tokenizers import Tokenizer

NONCAUSAL = "this model sees later tokens: its loss depends on the batch and is no language model's"


def wanted_arch(
    preset: Mapping[str, Any] | None, pattern: str | None, arch: Mapping[str, Any], vocab_size: int | None = None
) -> Arch | None:
    """Return the architecture, or None when neither is given; ``vocab_size`` is the data's, where data is read.

    Raises ConfigError when both are given or a pattern lacks its width.
    """
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.presets import preset as build_preset

    fields = {key: value for key, value in arch.items() if value is not None}
    if vocab_size is not None:
        fields.setdefault("vocab_size", vocab_size)
    if preset and pattern:
        raise ConfigError(
            f"give preset={preset['name']} or pattern={pattern!r}, not both", field="pattern", got=pattern
        )
    if preset:
        own = {key: value for key, value in preset.items() if key != "name" and value is not None}
        if vocab_size is not None:
            own["vocab_size"] = fields["vocab_size"]
        return build_preset(preset["name"], **{**own, **fields})
    if not pattern:
        return None
    if "d_model" not in fields:
        raise ConfigError(f"pattern={pattern!r} needs a width: arch.d_model=64", field="arch.d_model", allowed=">= 1")
    fields.setdefault("vocab_size", 256)
    return Arch.from_pattern(pattern, **fields)


def study_folder(study: str, runs: Path) -> Path:
    """Return the folder of a study that is given by its folder, its name or the beginning of it; it may not exist."""
    from hybridnas.study.folder import completed

    given = Path(study).expanduser()
    return given if (given / "study.json").is_file() else completed(Path(runs) / study)


def model_folder(model: Path | None, study: str | None = None, runs: Path = Path("runs")) -> Path:
    """Return the folder of an exported model: itself, that of a training run (model/) or of a study's best (best/).

    Raises StudyError for a study that has exported no model yet.
    """
    from hybridnas.export.layout import CONFIG

    if study is not None:
        folder = study_folder(study, runs)
        if not (folder / "best" / CONFIG).is_file():
            command = shlex.join(["python", "-m", "hybridnas.export", f"study={study}", "out=DIR"])
            raise StudyError(
                f"{folder} has no exported model in best/; run the search to its end, or {command}",
                field="study",
                got=study,
            )
        return folder / "best"
    from hybridnas.study.folder import completed

    assert model is not None
    model = completed(model)
    for folder in (model, model / "best", model / "model"):
        if (folder / CONFIG).is_file():
            return folder
    return model


def stored_model(folder: Path) -> HybridLM:
    """Return the model of a folder on the CPU: one of ours, or one of transformers' classes that we can read.

    Raises ExportError or ConfigError for any other folder.
    """
    from hybridnas.api import from_hf
    from hybridnas.errors import ExportError
    from hybridnas.export.layout import MODEL_TYPE
    from hybridnas.export.load import load, read_ours

    try:
        read_ours(folder)
    except ExportError as error:
        if error.field == "model_type" and error.got not in (None, MODEL_TYPE):
            return from_hf(folder)
        raise
    return load(folder, device="cpu")


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that lies in a model's folder, None where there is none."""
    from hybridnas.data.tokenizers import load_tokenizer
    from hybridnas.export.layout import TOKENIZER_FILES

    return load_tokenizer(folder) if (folder / TOKENIZER_FILES[0]).is_file() else None


def generate_command(folder: Path) -> str:
    """Return the command that shows what a model's folder generates; empty where its ids are neither text nor sound."""
    from hybridnas.data.cache import read_json
    from hybridnas.export.layout import TOKENIZER_FILES

    if not (folder / TOKENIZER_FILES[0]).is_file():
        return ""
    settings = (read_json(folder / "tokenizer_config.json") or {}).get("hybridnas") or {}
    given = {"audio": "out=sample.wav", "dna": "prompt=ACGT"}.get(str(settings.get("kind")), "prompt=def ")
    return shlex.join(["python", "-m", "hybridnas.generate", f"model={folder}", given])


def in_tokens_of(data: SourceConfig, tokenizer: Tokenizer, folder: Path) -> SourceConfig:
    """Return the settings of text in the tokens of a model's folder, of other data as they are."""
    if "tokenizer" not in data.field_names():
        return data
    name = "bytes" if tokenizer.kind == "bytes" else str(folder)
    return data.replace(tokenizer=name, **{k: None for k in ("vocab_size", "separator") if hasattr(data, k)})
