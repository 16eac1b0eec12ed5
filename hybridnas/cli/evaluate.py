"""python -m hybridnas.evaluate: the loss of a model, its accuracy at other lengths, or a suite of small trainings."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import ARCH, DEVICE, Command, Done, group
from hybridnas.cli.wanted import NONCAUSAL, in_tokens_of, model_folder, own_tokenizer, wanted_arch
from hybridnas.config import option
from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.source import Source
    from hybridnas.train.evaluate import Score


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    data: Mapping[str, Any] = group("stdlib", "what is measured on")
    preset: Mapping[str, Any] | None = group(None, "an untrained architecture of a paper; with suite=, what is trained")
    suite: Mapping[str, Any] | None = group(None, "a published suite of small trainings")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    model: Path | None = option(None, "folder of an exported model, of a training run, or of a study")
    pattern: str | None = option(None, "an untrained architecture as a pattern; with suite=, what is trained")
    patterns: tuple[str, ...] = option(
        (), "with suite=: several architectures, patterns or presets, e.g. [Mx4,(ME)x2,transformer]"
    )
    arch: Mapping[str, Any] = option({}, ARCH)
    lengths: tuple[int, ...] = option(
        (), "accuracy at each of these lengths, in constant memory for recurrent blocks, e.g. [64,1024,1M]", ge=1
    )
    positions: bool = option(
        False, "loss by position in a context of seq_len tokens, read over the state: how far back is used [yes/no]"
    )
    probe: str | None = option(
        None,
        "with data=labels: what a frozen model's vectors tell of the labels, by logistic regression on the mean over a "
        "text or on its last vector",
        choices=("mean", "last"),
    )
    lm_eval: tuple[str, ...] = option(
        (), "tasks of lm-eval instead, names or files NAME.yaml, at the context seq_len, e.g. [lambada_openai]"
    )
    max_gib: float | None = option(None, "lengths=: memory that the state may take; none: what is free [GiB]", gt=0)
    out: Path | None = option(None, "lengths=, positions=: CSV of the results")
    valid_tokens: int | None = option(None, "validation tokens; none: as in training, else 131,072 [tokens]", ge=1)
    part: str = option(
        "valid", "what is measured: valid, by which candidates are chosen, or test", choices=("valid", "test")
    )
    seq_len: int | None = option(None, "context; none: that of the training, else 256 [tokens]", ge=1)
    batch_size: int = option(16, "sequences in one forward pass [count]", ge=1)
    seed: int = option(0, "seed of the weights of an untrained model", ge=0, le=2**63 - 1)
    device: str = option("auto", DEVICE)
    precision: str = option(
        "auto", "of matrix products; auto: bfloat16 on a GPU, else float32", choices=("auto", "float32", "bfloat16")
    )
    allow_noncausal: bool = option(
        False,
        "measure a model whose layers see later tokens (expert_choice): its loss is no language model's [yes/no]",
    )
    tracking: str | None = option(
        None,
        "with suite=: MLflow tracking URI; none: sqlite in the suite's folder; off: no MLflow [URI]",
        aliases={"false": "off"},
    )

    @classmethod
    def label(cls) -> str:
        return "evaluate"


def run(settings: Settings) -> Done:
    """Measure on a held-out part of the data and print loss, bits per byte, accuracy and speed; or run a suite."""
    from hybridnas.hardware import pick_device

    device = pick_device(settings.device)  # refused before any data is read
    if settings.suite:
        from hybridnas.cli.suites import run_suite

        return run_suite(settings)
    if settings.lengths:
        from hybridnas.cli.suites import run_lengths

        return run_lengths(settings)
    if settings.lm_eval:
        return _lm_eval(settings, str(device))
    if settings.probe is not None:
        return _probe(settings, settings.probe, device)
    if settings.patterns:
        raise ConfigError(
            "patterns=[...] belongs to a suite, e.g. suite=mad; give pattern=TEXT for one model", field="patterns"
        )
    from hybridnas.data import check_vocab
    from hybridnas.train.evaluate import evaluate

    model, source, facts = _exported(settings) if settings.model else _untrained(settings)
    check_vocab(source.vocab_size, model.arch.vocab_size)
    show.line(f"model: {model.arch.pattern}, d_model {model.arch.d_model}, fingerprint {model.arch.short}")
    show.line(f"data: {source.describe()}")
    model = model.to(device)
    if settings.positions:
        return _positions(settings, model, source, facts)
    began = time.perf_counter()
    score = evaluate(
        model,
        source,
        n_tokens=settings.valid_tokens or facts.get("valid_tokens") or 131_072,
        batch_size=settings.batch_size,
        seq_len=source.context(settings.seq_len, facts.get("seq_len") or 256),
        device=device,
        precision=settings.precision,
        allow_noncausal=settings.allow_noncausal,
        part=settings.part,
        heads=_heads(settings, model, source),
    )
    seconds = time.perf_counter() - began
    rows = [["loss [nats per token]", f"{score.loss:.4f}"]]
    if score.bits_per_byte is not None:
        bits, name = source.bits(score.bits_per_byte)
        rows.append([f"bits per {name}", f"{bits:.4f}"])
    intervals = _intervals(score, source, settings.part)
    if score.correlation is None:
        rows.append(["accuracy", f"{score.accuracy:.4f}{_range(intervals.get('accuracy'))}"])
    else:
        rows.append(["R2", f"{score.accuracy:.4f}{_range(intervals['accuracy'])}"])
        rows.append(["correlation", f"{score.correlation:.4f}{_range(intervals['correlation'])}"])
    rows.append(["tokens measured", f"{score.tokens:,}"])
    rows.append([f"tokens/s on {device}", f"{score.tokens / seconds:,.0f}"])
    recorded = facts.get(f"{settings.part}_loss")
    if isinstance(recorded, float):
        rows.append(["loss recorded in training", f"{recorded:.4f}"])
    if not model.arch.causal:
        show.line(NONCAUSAL)
    show.table({"valid": "Validation", "test": "Test"}[settings.part], ["figure", "value"], rows)
    found = {name: getattr(score, name) for name in ("loss", "bits_per_byte", "accuracy", "tokens")}
    about = {"pattern": str(model.arch.pattern), "fingerprint": model.arch.fingerprint(), "data": source.describe()}
    more = {} if score.correlation is None else {"correlation": score.correlation}
    found |= {**more, "intervals": {name: list(interval) for name, interval in intervals.items()}}
    return Done({**about, "part": settings.part, **found, "seconds": seconds, "device": str(device)})


def _heads(settings: Settings, model: HybridLM, source: Source) -> Any:
    """Return the heads that the data is read through, as the run in ``model=`` trained them; None where it has none."""
    from hybridnas.train.checkpoint import load_heads
    from hybridnas.train.objective import make_heads
    from hybridnas.train.records import RUN

    heads = make_heads(source, model, settings.seed)
    if not len(heads) or settings.model is None:
        return heads if settings.model is None else None
    if not (settings.model / RUN).is_file():
        raise ConfigError(
            f"this data is read through a head that was trained with its model and stays in the run's checkpoint, and "
            f"{settings.model} is no folder of a training run; give model=RUN, where 'train ... out=RUN' has written",
            field="model",
            got=str(settings.model),
            allowed="the folder of a training run",
        )
    return load_heads(settings.model, heads)


def _intervals(score: Score, source: Source, part: str) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of what was measured once for each example: a label or a number."""
    from hybridnas.analysis.intervals import correlation_interval, explained_interval, share_interval

    if score.numbers is not None and score.correlation is not None:
        predicted, true = (side.tolist() for side in score.numbers)
        return {
            "accuracy": explained_interval(predicted, true),
            "correlation": correlation_interval(score.correlation, len(true)),
        }
    held_out = source.test_tokens if part == "test" else source.valid_tokens
    if source.seq_len is None or not held_out or score.tokens * source.seq_len > held_out or score.parts:
        return {}  # several places of one example are not drawn by themselves
    return {"accuracy": share_interval(round(score.accuracy * score.tokens), score.tokens)}


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.4f} to {interval[1]:.4f}, 95 %)"


def _positions(settings: Settings, model: HybridLM, source: Source, facts: Mapping[str, Any]) -> Done:
    """Print the loss by position."""
    from hybridnas.files import write_csv
    from hybridnas.hardware import pick_device
    from hybridnas.train.positions import loss_by_position

    rows = loss_by_position(
        model,
        source,
        n_tokens=settings.valid_tokens or facts.get("valid_tokens") or 131_072,
        batch_size=settings.batch_size,
        seq_len=source.context(settings.seq_len, facts.get("seq_len") or 256),
        device=pick_device(settings.device),
        part=settings.part,
    )
    lines = [[f"{row.first:,} to {row.last:,}", f"{row.loss:.4f}", f"{row.tokens:,}"] for row in rows]
    show.table("Loss by position", ["tokens of context", "loss [nats per token]", "tokens measured"], lines)
    found = [row._asdict() for row in rows]
    if settings.out is not None:
        write_csv(settings.out, list(found[0]), found)
        show.line(f"written: {settings.out}")
    about = {"pattern": str(model.arch.pattern), "fingerprint": model.arch.fingerprint(), "data": source.describe()}
    return Done({**about, "part": settings.part, "positions": found, "out": settings.out})


def _lm_eval(settings: Settings, device: str) -> Done:
    """Score a folder on tasks of lm-eval and print their metrics."""
    from hybridnas.export.layout import home
    from hybridnas.hf.scored import lm_eval_scores

    if settings.model is None:
        raise ConfigError(
            "lm_eval=[...] reads an exported model with its tokenizer; give model=FOLDER", field="model", got=None
        )
    folder = home(model_folder(settings.model))
    scores = lm_eval_scores(
        folder, settings.lm_eval, device=device, batch_size=settings.batch_size, max_length=settings.seq_len
    )
    rows = [[task, metric, f"{value:.4f}"] for task, found in scores.items() for metric, value in found.items()]
    show.table("lm-eval", ["task", "metric", "value"], rows)
    return Done({"model": str(folder), "lm_eval": scores, "device": device})


def _probe(settings: Settings, pool: str, device: Any) -> Done:
    """Print what a linear probe finds, beside the untrained architecture and the commonest label."""
    from dataclasses import asdict

    from hybridnas.data import open_source, source_config
    from hybridnas.data.labels import Labels
    from hybridnas.export.layout import home
    from hybridnas.export.load import load
    from hybridnas.train.probe import linear_probe

    if settings.model is None or settings.data["kind"] != "labels":
        raise ConfigError(
            "probe= reads model=FOLDER and data=labels data.path=FILE with texts and labels; give both",
            field="probe",
            got=settings.data["kind"],
            allowed="model=FOLDER data=labels",
        )
    folder = home(model_folder(settings.model))
    model, tokenizer = load(folder, device="cpu").to(device), own_tokenizer(folder)
    if tokenizer is None:
        raise ConfigError(
            f"probe= reads texts in the model's own tokens, and {folder} has no tokenizer: it learnt neither text nor "
            f"DNA; give another model",
            field="model",
            got=str(folder),
        )
    source = open_source(source_config(settings.data))
    assert isinstance(source, Labels)
    show.line(f"model: {model.arch.pattern}, d_model {model.arch.d_model}, fingerprint {model.arch.short}")
    show.line(f"data: {source.describe()}")
    found = linear_probe(model, tokenizer, source, pool=pool, batch_size=settings.batch_size, seed=settings.seed)
    rows = [
        [name, f"{one.accuracy:.4f}{_range(one.interval)}", f"{one.balanced:.4f}", f"{one.train_accuracy:.4f}"]
        for name, one in (("this model", found.model), ("untrained weights", found.untrained))
    ]
    rows.append(["commonest label", f"{found.commonest:.4f}", f"{1 / found.labels:.4f}", "-"])
    columns = ["vectors of", "test accuracy", "mean over labels", "training accuracy"]
    show.table(f"Linear probe, {pool} vector", columns, rows)
    about = {"pattern": str(model.arch.pattern), "fingerprint": model.arch.fingerprint(), "data": source.describe()}
    return Done({**about, "probe": pool, **asdict(found)})


def _exported(settings: Settings) -> tuple[HybridLM, Source, dict[str, Any]]:
    """Return an exported model, the data in the model's own tokens, and the facts of its training."""
    from hybridnas.data import open_source, source_config
    from hybridnas.export.layout import home
    from hybridnas.export.load import load, read_config

    if settings.preset or settings.pattern:
        raise ConfigError(
            "evaluate takes model=FOLDER, or preset= or pattern= for an untrained model, not both", field="model"
        )
    folder = home(model_folder(settings.model))
    model = load(folder, device="cpu")
    data = source_config(settings.data)
    own = own_tokenizer(folder)
    if own is not None and "tokenizer" in data.field_names():
        given = settings.data.get("tokenizer", "bytes")
        data = in_tokens_of(data, own, folder)
        if given not in ("bytes", data.to_dict()["tokenizer"]):
            show.line(f"data.tokenizer={given} gives way to the model's own tokenizer")
    return model, open_source(data), dict(read_config(folder).get("training") or {})


def _untrained(settings: Settings) -> tuple[HybridLM, Source, dict[str, Any]]:
    """Return a preset or a pattern with random weights: what a model scores before it has learnt anything."""
    from hybridnas.arch.model import HybridLM
    from hybridnas.data import open_source, source_config

    if not (settings.preset or settings.pattern):
        raise ConfigError("evaluate needs model=FOLDER (an exported model), preset=NAME or pattern=TEXT", field="model")
    source = open_source(source_config(settings.data))
    arch = wanted_arch(settings.preset, settings.pattern, settings.arch, source.vocab_size)
    assert arch is not None
    blind = math.log(arch.vocab_size)
    show.line(f"untrained: the weights are random (seed {settings.seed}); a blind guess has loss {blind:.4f}")
    return HybridLM(arch, seed=settings.seed), source, {}
