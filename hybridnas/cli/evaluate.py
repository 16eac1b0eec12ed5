"""python -m hybridnas.evaluate: the loss of a model, its accuracy at other lengths, or a suite of small trainings."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.source import Source

HELP = "measure a model's loss, its accuracy by length (lengths=), or architectures on a suite of tasks (suite=)"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(FrozenConfig):
    """Settings of the command besides ``data``, ``preset``, ``pattern`` and ``arch``."""

    model: str | None = option(None, "folder that 'python -m hybridnas.export' wrote")
    valid_tokens: int | None = option(None, "validation tokens; null: as in training, else 131,072 [tokens]", ge=1)
    seq_len: int | None = option(None, "context; null: that of the training, else 256 [tokens]", ge=1)
    batch_size: int = option(16, "sequences in one forward pass [count]", ge=1)
    seed: int = option(0, "seed of the weights of an untrained model", ge=0)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option(
        "auto", "of matrix products; auto: bfloat16 on a GPU, else float32", choices=("auto", "float32", "bfloat16")
    )

    @classmethod
    def label(cls) -> str:
        return "evaluate"


def run(config: dict[str, Any]) -> int:
    """Measure on the data's validation part and print loss, bits per byte, accuracy and speed; or run a suite."""
    if config.get("suite"):
        from hybridnas.cli.suites import run_suite

        return run_suite(config)
    if config.get("lengths"):
        from hybridnas.cli.suites import run_lengths

        return run_lengths(config)
    if config.get("patterns"):
        raise ConfigError("patterns=[...] belongs to a suite, e.g. suite=mad; give pattern=TEXT for one model")
    settings = EvaluateConfig.from_dict({k: v for k, v in config.items() if k in EvaluateConfig.field_names()})
    from hybridnas.data import check_vocab
    from hybridnas.hardware import pick_device
    from hybridnas.train.evaluate import evaluate

    device = pick_device(settings.device)
    model, source, facts = _exported(settings, config) if settings.model else _untrained(settings, config)
    check_vocab(source.vocab_size, model.arch.vocab_size)
    show.line(f"model: {model.arch.pattern}, d_model {model.arch.d_model}, fingerprint {model.arch.short}")
    show.line(f"data: {source.describe()}")
    model = model.to(device)
    began = time.perf_counter()
    score = evaluate(
        model,
        source,
        n_tokens=settings.valid_tokens or facts.get("valid_tokens") or 131_072,
        batch_size=settings.batch_size,
        seq_len=source.context(settings.seq_len, facts.get("seq_len") or 256),
        device=device,
        precision=settings.precision,
    )
    seconds = time.perf_counter() - began
    rows = [["loss [nats per token]", f"{score.loss:.4f}"]]
    if score.bits_per_byte is not None:
        rows.append(["bits per byte", f"{score.bits_per_byte:.4f}"])
    rows.append(["accuracy", f"{score.accuracy:.4f}"])
    rows.append(["tokens measured", f"{score.tokens:,}"])
    rows.append([f"tokens/s on {device}", f"{score.tokens / seconds:,.0f}"])
    if isinstance(facts.get("valid_loss"), float):
        rows.append(["loss recorded in training", f"{facts['valid_loss']:.4f}"])
    show.table("Validation", ["figure", "value"], rows)
    return 0


def _exported(settings: EvaluateConfig, config: dict[str, Any]) -> tuple[HybridLM, Source, dict[str, Any]]:
    """Return an exported model, the data in the model's own tokens, and the facts of its training."""
    from hybridnas.data import open_source, source_config
    from hybridnas.export.layout import TOKENIZER_FILES, home
    from hybridnas.export.load import load, load_tokenizer, read_config

    if config.get("preset") or config.get("pattern"):
        raise ConfigError("evaluate takes model=FOLDER, or preset= or pattern= for an untrained model, not both")
    assert settings.model is not None
    folder = home(settings.model)
    model = load(folder, device="cpu")
    data = source_config(config["data"])
    if (folder / TOKENIZER_FILES[0]).is_file() and "tokenizer" in data.field_names():
        own = load_tokenizer(folder)
        words = "bytes" if own.kind == "bytes" else str(folder)
        given = config["data"].get("tokenizer", "bytes")
        if given not in ("bytes", words):
            show.line(f"data.tokenizer={given} gives way to the model's own tokenizer")
        data = data.replace(tokenizer=words, **{k: None for k in ("vocab_size", "separator") if hasattr(data, k)})
    return model, open_source(data), dict(read_config(folder).get("training") or {})


def _untrained(settings: EvaluateConfig, config: dict[str, Any]) -> tuple[HybridLM, Source, dict[str, Any]]:
    """Return a preset or a pattern with random weights: what a model scores before it has learnt anything."""
    from hybridnas.arch.model import HybridLM
    from hybridnas.cli.wanted import wanted_arch
    from hybridnas.data import open_source, source_config

    if not (config.get("preset") or config.get("pattern")):
        raise ConfigError("evaluate needs model=FOLDER (an exported model), preset=NAME or pattern=TEXT")
    source = open_source(source_config(config["data"]))
    arch = wanted_arch(config, source.vocab_size)
    assert arch is not None
    blind = math.log(arch.vocab_size)
    show.line(f"untrained: the weights are random (seed {settings.seed}); a blind guess has loss {blind:.4f}")
    return HybridLM(arch, seed=settings.seed), source, {}
