"""python -m hybridnas.import model=DIR out=DIR: a pretrained model of a transformers class as a folder of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.config import option
from hybridnas.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    model: Path | None = option(None, "folder with config.json and safetensors, as transformers or the vendor wrote it")
    out: Path | None = option(None, "folder to write; an earlier export there is replaced")

    @classmethod
    def label(cls) -> str:
        return "import"


def run(settings: Settings) -> Done:
    """Read the model, write it with its tokenizer, and say what it is."""
    from hybridnas.cli.wanted import own_tokenizer
    from hybridnas.export.folder import export
    from hybridnas.export.hf import read
    from hybridnas.export.layout import MODEL_TYPE, home
    from hybridnas.export.load import read_json
    from hybridnas.units import human

    for name in ("model", "out"):
        if getattr(settings, name) is None:
            raise ConfigError("import needs model=DIR and out=DIR, e.g. model=downloads/mamba out=mamba", field=name)
    assert settings.model is not None
    assert settings.out is not None
    folder = home(settings.model)
    content = read_json(folder)
    if isinstance(content, dict) and content.get("model_type") == MODEL_TYPE:
        raise ConfigError(
            f"{folder} is a model of ours, which every command reads as it is; import is for those of transformers",
            field="model",
            got=str(settings.model),
        )
    model = read(folder)
    written = export(model, settings.out, tokenizer=own_tokenizer(folder))
    cost = model.arch.cost()
    show.line(
        f"{content['model_type']}: {model.arch.pattern}, {human(cost.params)} parameters, {human(cost.active_params)} "
        f"active; reloaded with equal logits"
    )
    show.line(f"model:  {written}")
    return Done(
        {
            "model": str(written),
            "model_type": content["model_type"],
            "pattern": str(model.arch.pattern),
            "fingerprint": model.arch.fingerprint(),
        }
    )
