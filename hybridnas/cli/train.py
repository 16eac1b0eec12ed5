"""``python -m hybridnas.train``: train one architecture; the same command again goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.cli import show
from hybridnas.cli.command import ARCH, DEVICE, EXPERIMENT, PATTERN, TRACKING, Command, Done, group
from hybridnas.cli.describe import facts
from hybridnas.cli.wanted import in_tokens_of, model_folder, own_tokenizer, stored_model, wanted_arch
from hybridnas.config import option
from hybridnas.errors import ConfigError, TrainingError
from hybridnas.units import human, percent, several

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM
    from hybridnas.data import Source, SourceConfig
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.records import Eval, TrainResult
    from hybridnas.train.start import Lora

EXTRAS = {  # routing statistics in the table of measurements
    "dropped": "share of tokens that no expert took, its capacity being full",
    "load_balance": "weighted auxiliary loss that evens out the experts' tokens",
    "max_load": "tokens of the busiest expert over the average",
}


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    preset: Mapping[str, Any] | None = group(None, "architecture of a paper, with its sizes")
    data: Mapping[str, Any] = group("stdlib", "what is trained on")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    pattern: str | None = option(None, PATTERN)
    arch: Mapping[str, Any] = option({}, ARCH)
    model: Path | None = option(
        None,
        "go on from a model instead: an exported folder, a training run, a study, or a folder of transformers' classes",
    )
    grow: Path | None = option(
        None, "begin as this smaller model: wider by a whole factor, deeper, with the same function where that can be"
    )
    tokenizer: str = option(
        "model",
        "with model=: whose tokens text is read in; data: those of data.tokenizer, and rows of new tokens start anew",
        choices=("model", "data"),
    )
    freeze: tuple[str, ...] = option(
        (), "with model=: parameters that stay as they are, as patterns of names, e.g. [embedding.*,layers.0.*]"
    )
    lora: int | None = option(
        None, "with model=: train adapters of this rank alone (LoRA, by PEFT), which end up in the weights", ge=1
    )
    lora_alpha: float = option(16.0, "lora=: factor of an adapter, times its rank [1]", gt=0)
    lora_layers: tuple[str, ...] = option(("layers.*",), "lora=: linear layers that get one, as patterns of names")
    train: Mapping[str, Any] = option({}, "one training run; what is not given is as recipe= says")
    recipe: str = option(
        "none",
        "where train.* come from unless given; none: their defaults; paper: the preset's own (steps, batch, LR, decay)",
        choices=("none", "paper"),
    )
    out: Path | None = option(
        None, "folder of the run; none: runs/train-NAME-HASH, its own for every combination of settings"
    )
    device: str = option("auto", DEVICE)
    impl: str = option("auto", "implementation of the kernels")
    tracking: str | None = option(None, TRACKING, aliases={"false": "off"})
    tracking_experiment: str = option("hybridnas", EXPERIMENT)
    max_seconds: float | None = option(
        None, "save and stop after this long; the same command goes on; none: no limit [s]", gt=0
    )

    @classmethod
    def label(cls) -> str:
        return "train"


def run(settings: Settings) -> Done:
    """Train what ``preset=`` or ``pattern=`` names and print its measurements.

    Raises TrainingError with the reason of a run that failed.
    """
    from hybridnas.arch.presets import DEFAULT_REFERENCE
    from hybridnas.data import open_source, source_config
    from hybridnas.hardware import Impl, pick_device

    data = source_config(settings.data)
    config = train_settings(settings, data.own_seq_len)
    _check_start(settings, DEFAULT_REFERENCE)
    pick_device(settings.device)  # refused before any data is read
    Impl.of(settings.impl)
    given = None
    if settings.model is not None:
        given = _given(settings, data)
    elif settings.grow is not None:
        given = _grown(settings, data)
    source = open_source(data) if given is None else given.source
    source.context(config.seq_len, config.seq_len)  # refuses another length than the task's
    arch = wanted_arch(settings.preset, settings.pattern, settings.arch, source.vocab_size)
    if given is not None:
        arch = given.model.arch
    assert arch is not None

    from hybridnas.cli.progress import progress
    from hybridnas.train.distributed import end_follower, leads
    from hybridnas.train.fit import fit
    from hybridnas.train.loop import identity
    from hybridnas.train.loop import run as train
    from hybridnas.train.tracking import Tracking

    about = identity(arch, source, config) if given is None else identity(given.model, source, config, given.start)
    folder = settings.out or Path(_folder(settings, about))
    if leads():
        _announce(arch, source, config, folder)
    preset = settings.preset["name"] if settings.preset else None
    labels = {} if preset is None else {"preset": preset}
    if given is not None:
        labels["model"] = str(given.folder)
    with Tracking(settings.tracking, tags=labels, experiment=settings.tracking_experiment) as tracking:
        how: dict[str, Any] = {
            "folder": folder,
            "device": settings.device,
            "max_seconds": settings.max_seconds,
            "labels": labels,
            "callbacks": [progress(), tracking],
        }
        if given is None:
            result = train(arch, source, config, impl=settings.impl, **how)
        else:
            result = fit(
                given.model,
                source,
                freeze=settings.freeze,
                lora=given.lora,
                weights=given.start,
                **how,
                **config.to_dict(),
            )
        if not leads():
            end_follower()
        _table(result.evals, source)
        if result.test_loss is not None:
            test = {name: result.evals[-1].aux.get(f"test_{name}") for name in ("loss", "bits_per_byte", "accuracy")}
            numeric = "test_correlation" in result.evals[-1].aux
            unit = "bits/byte"
            if test["bits_per_byte"] is not None:
                test["bits_per_byte"], name = source.bits(test["bits_per_byte"])
                unit = f"bits/{name}"
            words = {"loss": "nats/token", "bits_per_byte": unit, "accuracy": "R2" if numeric else "accuracy"}
            found = ", ".join(f"{value:.4f} {words[name]}" for name, value in test.items() if value is not None)
            show.line(f"test: {found}, on data that nothing was chosen by")
        if result.status == "failed":
            raise TrainingError(f"{folder}: {result.reason}")
        show.line(result.reason or f"completed: {folder}")
        exported = None
        if result.status == "completed" and result.model is not None:
            exported = _export(result, source, config, settings, data, folder)
    last = asdict(result.evals[-1]) if result.evals else {}
    about = {"folder": str(folder), "model": exported, "status": result.status, "reason": result.reason}
    return Done({**about, **facts(arch, config.seq_len), "final": last, "evals": len(result.evals)})


class _Given(NamedTuple):
    """What ``model=`` names, ready to be trained on."""

    folder: Path
    model: HybridLM
    source: Source
    lora: Lora | None
    start: dict[str, Any]  # what identifies it


def _check_start(settings: Settings, reference: str) -> None:
    """Raise ConfigError where it is not clear what is to be trained."""
    given = [name for name in ("model", "preset", "pattern") if getattr(settings, name)]
    if settings.grow is not None and settings.model is not None:
        raise ConfigError(
            "train grow=FOLDER begins a larger architecture, of preset= or pattern=, and model=FOLDER goes on with its "
            "own; leave one out",
            field="grow",
            got=str(settings.grow),
        )
    if len(given) > 1 and "model" in given:
        raise ConfigError(
            f"train model=FOLDER goes on from weights whose architecture is given, got {given[1]}= too; leave one out",
            field=given[1],
            got=getattr(settings, given[1]),
        )
    if not given:
        raise ConfigError(
            f"train needs an architecture: preset={reference}, or pattern='(ME)x2' arch.d_model=64; or model=FOLDER",
            field="preset",
        )
    if settings.model is None:
        for name, got in (("freeze", settings.freeze), ("lora", settings.lora)):
            if got:
                raise ConfigError(f"{name}= is for weights that exist; give model=FOLDER", field=name, got=got)


def _given(settings: Settings, data: SourceConfig) -> _Given:
    """Return the model of ``model=`` with the data in its tokens, or itself in the data's; says what that changes."""
    from hybridnas.data import open_source
    from hybridnas.export.layout import home
    from hybridnas.train.start import Lora, weights_digest, with_tokens

    assert settings.model is not None
    folder = home(model_folder(settings.model))
    model = stored_model(folder).float()
    start: dict[str, Any] = {"weights": weights_digest(model)}
    own = own_tokenizer(folder)
    if settings.tokenizer == "model" and own is not None:
        data = in_tokens_of(data, own, folder)
    source = open_source(data)
    if settings.tokenizer == "data":
        model, kept = with_tokens(
            model, own, source.tokenizer, source.vocab_size, seed=int(settings.train.get("seed") or 0)
        )
        start["tokens"] = source.vocab_size
        show.line(
            f"tokens: of {source.vocab_size:,} rows of embedding and head, {kept:,} stand for tokens that the model "
            f"knows and are kept, {source.vocab_size - kept:,} are drawn anew"
        )
    show.line(f"start: the weights of {folder}; the learning rate warms up again and follows train.schedule anew")
    lora = None
    if settings.lora is not None:
        lora = Lora(rank=settings.lora, alpha=settings.lora_alpha, layers=settings.lora_layers)
    start |= {"freeze": list(settings.freeze), "lora": None if lora is None else lora.to_dict()}
    return _Given(folder, model, source, lora, {name: value for name, value in start.items() if value})


def _grown(settings: Settings, data: SourceConfig) -> _Given:
    """Return the architecture of ``preset=`` or ``pattern=`` with the weights of a smaller model; says what that keeps.

    Text is read in the smaller model's tokens.
    """
    from hybridnas.data import open_source
    from hybridnas.export.layout import home
    from hybridnas.grafting.growth import grow
    from hybridnas.grafting.initial import EXACT
    from hybridnas.train.start import weights_digest

    assert settings.grow is not None
    folder = home(model_folder(settings.grow))
    small = stored_model(folder).float()
    own = own_tokenizer(folder)
    source = open_source(data if own is None else in_tokens_of(data, own, folder))
    arch = wanted_arch(settings.preset, settings.pattern, settings.arch, small.arch.vocab_size)
    assert arch is not None
    found = grow(small, arch, seed=int(settings.train.get("seed") or 0))
    for note in found.notes:
        show.line(f"note: {note}")
    same = "the same function" if found.difference < EXACT else "not the same function"
    show.line(
        f"start: {folder}, {small.arch.pattern} of d_model {small.arch.d_model}, grown: {same} (largest difference of "
        f"logits {found.difference:.1e} of the largest, in float64)"
    )
    return _Given(folder, found.model, source, None, {"weights": weights_digest(found.model)})


def _export(
    result: TrainResult, source: Source, config: TrainConfig, settings: Settings, data: Any, folder: Path
) -> str:
    """Leave the trained model as a folder that ``hybridnas.load`` reads."""
    from hybridnas.arch.model import HybridLM
    from hybridnas.export.card import TEST_LABELS
    from hybridnas.export.folder import export
    from hybridnas.export.trials import data_words

    last = result.evals[-1]
    card = {
        "preset": settings.preset["name"] if settings.preset else None,
        "data": data_words(data.to_dict()),
        "tokenizer": getattr(data, "tokenizer", None),
        "tokens": last.tokens,
        **{name: getattr(config, name) for name in ("batch_size", "seq_len", "lr", "seed", "valid_tokens")},
        **{name: getattr(last, name) for name in ("valid_loss", "bits_per_byte", "accuracy", "seconds")},
        **{name: value for name, value in last.aux.items() if name in TEST_LABELS},
    }
    assert isinstance(result.model, HybridLM)
    where = export(result.model, folder / "model", source=source, card={k: v for k, v in card.items() if v is not None})
    show.line(f"model: {where}")
    return str(where)


def train_settings(settings: Settings, own_seq_len: int | None = None) -> TrainConfig:
    """Return the training settings: what is given, else the paper's recipe with ``recipe=paper``, else the defaults.

    ``own_seq_len`` is the context of a task, which stands unless another one is given.
    """
    from hybridnas.arch.presets import recipe
    from hybridnas.train.config import TrainConfig

    given = {key: value for key, value in settings.train.items() if value is not None}
    if own_seq_len is not None:
        given.setdefault("seq_len", own_seq_len)
    if settings.recipe == "none":
        return TrainConfig.from_dict(given)
    if not settings.preset:
        raise ConfigError(
            "recipe=paper belongs to a preset; give preset=NAME, or train.lr= and the like for a pattern",
            field="recipe",
            got=settings.recipe,
        )
    return TrainConfig.from_recipe(recipe(settings.preset["name"]), **given)


def _folder(settings: Settings, identity: dict[str, Any]) -> str:
    """One folder for one run: its name follows from everything that decides the run's numbers."""
    name = settings.preset["name"] if settings.preset else "pattern" if settings.model is None else "model"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return f"runs/train-{name}-{digest[:8]}"


def _announce(arch: Arch, source: Source, config: TrainConfig, folder: Path) -> None:
    cost = arch.cost(config.seq_len)
    show.line(
        f"model: {arch.pattern}, d_model {arch.d_model}, {human(cost.params)} parameters, "
        f"{human(cost.active_params)} active, fingerprint {arch.short}"
    )
    show.line(f"data: {source.describe()}")
    show.line(
        f"training: {several(config.steps, 'step')} of {config.step_tokens:,} tokens, {_asked(config)}"
        f"{config.tokens / max(1, cost.active_params):.3g} tokens per active parameter; folder {folder}"
    )
    if repeated := source.repeated(config.tokens):
        show.line(repeated)


def _asked(config: TrainConfig) -> str:
    """Say how many tokens are trained where whole steps make more of them than were asked for."""
    trained = config.steps * config.step_tokens
    return "" if trained == config.tokens else f"{trained:,} in all for the {config.tokens:,} asked, "


def _table(evals: list[Eval], source: Source) -> None:
    extras = sorted({name for value in evals for name in value.aux} & set(EXTRAS))
    right = "R2" if any("correlation" in value.aux for value in evals) else "accuracy"
    columns = ["tokens", "train loss", "valid loss", f"bits/{source.bits(0)[1]}", right, "tokens/s", *extras]
    rows = [
        [
            f"{value.tokens:,}",
            f"{value.train_loss:.4f}",
            f"{value.valid_loss:.4f}",
            "-" if value.bits_per_byte is None else f"{source.bits(value.bits_per_byte)[0]:.4f}",
            percent(value.accuracy),
            f"{value.tokens_per_second:,.0f}",
            *(f"{value.aux[name]:.4g}" if name in value.aux else "-" for name in extras),
        ]
        for value in evals
    ]
    show.table("Measurements (cross-entropy in nats per token, auxiliary losses apart)", columns, rows, left=())
    if extras:
        show.line("; ".join(f"{name}: {EXTRAS[name]}" for name in extras))
