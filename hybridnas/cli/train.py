"""``python -m hybridnas.train``: train one architecture; the same command again goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.errors import ConfigError, TrainingError
from hybridnas.units import human

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.data import Source
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.records import Eval, TrainResult

HELP = "train one architecture (preset= or pattern=), resumable"


def run(config: dict[str, Any]) -> int:
    """Train what ``preset=`` or ``pattern=`` names and print its measurements.

    Raises TrainingError with the reason of a run that failed.
    """
    from hybridnas.cli.wanted import wanted_arch
    from hybridnas.data import open_source, source_config

    data = source_config(config["data"])
    settings = train_settings(config, data.own_seq_len)
    if not (config.get("preset") or config.get("pattern")):
        raise ConfigError("train needs an architecture: preset=moe_mamba, or pattern='(ME)x2' arch.d_model=64")
    source = open_source(data)
    source.context(settings.seq_len, settings.seq_len)  # refuses another length than the task's
    arch = wanted_arch(config, source.vocab_size)
    assert arch is not None

    from hybridnas.cli.progress import progress
    from hybridnas.train.loop import identity
    from hybridnas.train.loop import run as train
    from hybridnas.train.tracking import Tracking

    folder = Path(config["out"] or _folder(config, identity(arch, source, settings)))
    _announce(arch, source.describe(), settings, folder)
    preset = config["preset"]["name"] if config.get("preset") else None
    labels = {} if preset is None else {"preset": preset}
    with Tracking(config["tracking"], tags=labels) as tracking:
        result = train(
            arch,
            source,
            settings,
            folder=folder,
            device=config["device"],
            impl=config["impl"],
            max_seconds=config["max_seconds"],
            labels=labels,
            callbacks=[progress(), tracking],
        )
        _table(result.evals)
        if result.status == "failed":
            raise TrainingError(f"{folder}: {result.reason}")
        show.line(result.reason or f"completed: {folder}")
        if result.status == "completed" and result.model is not None:
            _export(result, source, settings, config, folder)
    return 0


def _export(result: TrainResult, source: Source, settings: TrainConfig, config: dict[str, Any], folder: Path) -> None:
    """Leave the trained model as a folder that ``hybridnas.load`` reads."""
    from hybridnas.arch.model import HybridLM
    from hybridnas.export.folder import export
    from hybridnas.export.trials import data_words

    last = result.evals[-1]
    facts = {
        "preset": config["preset"]["name"] if config.get("preset") else None,
        "data": data_words(config["data"]),
        "tokenizer": config["data"].get("tokenizer"),
        "tokens": last.tokens,
        **{name: getattr(settings, name) for name in ("batch_size", "seq_len", "lr", "seed", "valid_tokens")},
        **{name: getattr(last, name) for name in ("valid_loss", "bits_per_byte", "accuracy", "seconds")},
    }
    assert isinstance(result.model, HybridLM)
    where = export(
        result.model, folder / "model", source=source, card={k: v for k, v in facts.items() if v is not None}
    )
    show.line(f"model: {where}")


def train_settings(config: dict[str, Any], own_seq_len: int | None = None) -> TrainConfig:
    """Return the training settings: what is given, else the paper's recipe with ``recipe=paper``, else the defaults.

    ``own_seq_len`` is the context of a task, which stands unless another one is given.
    """
    from hybridnas.arch.presets import recipe
    from hybridnas.train.config import TrainConfig

    given = {key: value for key, value in config["train"].items() if value is not None}
    if own_seq_len is not None:
        given.setdefault("seq_len", own_seq_len)
    if config["recipe"] in (None, "none"):
        return TrainConfig.from_dict(given)
    if config["recipe"] != "paper":
        raise ConfigError(f"recipe={config['recipe']!r} must be none or paper")
    if not config.get("preset"):
        raise ConfigError("recipe=paper belongs to a preset; give preset=NAME, or train.lr= and the like for a pattern")
    return TrainConfig.from_recipe(recipe(config["preset"]["name"]), **given)


def _folder(config: dict[str, Any], identity: dict[str, Any]) -> str:
    """One folder for one run: its name follows from everything that decides the run's numbers."""
    name = config["preset"]["name"] if config.get("preset") else "pattern"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"runs/train-{name}-{digest[:8]}"


def _announce(arch: Arch, data: str, settings: TrainConfig, folder: Path) -> None:
    cost = arch.cost(settings.seq_len)
    show.line(
        f"model: {arch.pattern}, d_model {arch.d_model}, {human(cost.params)} parameters, "
        f"{human(cost.active_params)} active, fingerprint {arch.short}"
    )
    show.line(f"data: {data}")
    show.line(
        f"training: {settings.steps:,} steps of {settings.step_tokens:,} tokens, "
        f"{settings.tokens / max(1, cost.active_params):.3g} tokens per active parameter; folder {folder}"
    )


def _table(evals: list[Eval]) -> None:
    extras = sorted({name for value in evals for name in value.aux} & {"dropped", "max_load", "load_balance"})
    columns = ["tokens", "train loss", "valid loss", "bits/byte", "accuracy", "tokens/s", *extras]
    rows = [
        [
            f"{value.tokens:,}",
            f"{value.train_loss:.4f}",
            f"{value.valid_loss:.4f}",
            "-" if value.bits_per_byte is None else f"{value.bits_per_byte:.4f}",
            f"{value.accuracy:.4f}",
            f"{value.tokens_per_second:,.0f}",
            *(f"{value.aux[name]:.4g}" if name in value.aux else "-" for name in extras),
        ]
        for value in evals
    ]
    show.table("Measurements (cross-entropy in nats per token, auxiliary losses apart)", columns, rows, left=())
