"""``python -m hybridnas.graft``: change the architecture of a trained model, and train the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.cli import show
from hybridnas.cli.command import ARCH, DEVICE, Command, Done, group
from hybridnas.cli.lineage import show_lineage
from hybridnas.cli.wanted import in_tokens_of, model_folder, own_tokenizer, stored_model
from hybridnas.config import option
from hybridnas.errors import ConfigError
from hybridnas.grafting.config import GraftConfig
from hybridnas.units import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from hybridnas.arch.model import HybridLM
    from hybridnas.data.tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(GraftConfig, Command):
    """Settings of the command: those of a graft, and where it reads and writes."""

    data: Mapping[str, Any] = group("stdlib", "what new blocks are fitted on, and losses are measured on")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    model: Path | None = option(
        None, "the trained model: an exported folder, a training run, a study, or a folder of transformers' classes"
    )
    edit: str | None = option(
        None, "what to change: 3:A->G, 3{d_ff=96}, +2:F, -4, 1<->3, 5>>2, 2|3, joined by ';', or a whole pattern"
    )
    arch: Mapping[str, Any] = option({}, f"settings of new blocks; {ARCH}")
    train: Mapping[str, Any] = option(
        {}, "context of the fit, batch and context of measurements, and the training afterwards"
    )
    out: Path | None = option(None, "folder to write the model to; its training is kept in out/run")
    device: str = option("auto", DEVICE)
    max_seconds: float | None = option(
        None, "save and stop the training after this long; the same command goes on; none: no limit [s]", gt=0
    )

    @classmethod
    def label(cls) -> str:
        return "graft"


class _Given(NamedTuple):
    """The model that is grafted, its tokenizer, and the optimizer's moments where its run has kept them."""

    folder: Path
    model: HybridLM
    tokenizer: Tokenizer | None
    moments: Mapping[str, Tensor]


def run(settings: Settings) -> Done:
    """Graft ``model=`` as ``edit=`` says, train it where ``tokens=`` asks for it, and write it to ``out=``."""
    from hybridnas.data import open_source, source_config
    from hybridnas.export.folder import export, refuse_foreign
    from hybridnas.export.layout import home
    from hybridnas.grafting.edits import plan
    from hybridnas.grafting.operation import fine_tune, train_config, transplant
    from hybridnas.hardware import pick_device

    for name, example in (("model", "model=runs/mine/model"), ("edit", "edit='3:A->G'"), ("out", "out=grafted")):
        if getattr(settings, name) is None:
            raise ConfigError(f"graft needs {name}=, e.g. {example}", field=name)
    assert settings.model is not None
    assert settings.edit is not None
    assert settings.out is not None
    device = pick_device(settings.device)
    config = GraftConfig.from_dict({name: getattr(settings, name) for name in GraftConfig.field_names()})
    data = source_config(settings.data)
    given = _given(settings.model)
    out = home(settings.out)
    if out in (home(given.folder), home(settings.model)):
        raise ConfigError(
            f"graft out={settings.out} is the model's own folder, which stays as it is; give another one",
            field="out",
            got=str(settings.out),
            allowed="another folder",
        )
    refuse_foreign(out)
    fields = {key: value for key, value in settings.arch.items() if value is not None}
    plan(given.model.arch, settings.edit, fields)  # refused before data is read
    if given.tokenizer is not None:
        data = in_tokens_of(data, given.tokenizer, given.folder)
    own_len = {} if data.own_seq_len is None else {"seq_len": data.own_seq_len}
    training = train_config(config, {**own_len, **settings.train}, data)
    source = open_source(data)
    model = given.model.float().to(device)
    moments = given.moments or None
    found = transplant(model, settings.edit, source, config, arch=fields, moments=moments, training=training)
    for note in found.notes:
        show.line(f"note: {note}")
    tokenizer = given.tokenizer or source.tokenizer
    card = {"data": source.describe()}
    written = export(found.model.cpu(), out, tokenizer=tokenizer, card=card)
    status = "grafted"
    if config.tokens:
        from hybridnas.cli.progress import progress

        found.model.to(device)
        result = fine_tune(
            found,
            model,
            source,
            config,
            training,
            folder=out / "run",
            callbacks=[progress()],
            max_seconds=settings.max_seconds,
        )
        status = result.status
        if result.status == "completed":
            written = export(found.model.cpu(), out, tokenizer=tokenizer, card={**card, "tokens": config.tokens})
        else:
            show.line(result.reason)
    show_lineage(found.model.lineage)
    before, after = model.arch.cost(training.seq_len), found.model.arch.cost(training.seq_len)
    show.line(
        f"model: {found.model.arch.pattern}, {len(found.names)} tensors kept"
        + (" with their moments" if found.moments else "")
        + f"; parameters {before.params:,} -> {after.params:,}, state at {training.seq_len} tokens "
        f"{human_bytes(before.state_bytes)} -> {human_bytes(after.state_bytes)}; {written}"
    )
    return Done(
        {
            "model": str(written),
            "status": status,
            "pattern": str(found.model.arch.pattern),
            "fingerprint": found.model.arch.fingerprint(),
            "graft": found.record,
            "notes": found.notes,
            "cost": {"before": asdict(before), "after": asdict(after)},
        }
    )


def _given(folder: Path) -> _Given:
    """Return the model of an exported folder, or of a training run that was left before its end, with its moments."""
    from hybridnas.export.layout import CONFIG
    from hybridnas.train.checkpoint import load, load_model
    from hybridnas.train.records import read_run

    where = model_folder(folder)
    if not (where / CONFIG).is_file() and read_run(folder) is not None:
        model, kept = load_model(folder), load(folder)
        return _Given(folder, model, None, {} if kept is None else kept.optimizer)
    return _Given(where, stored_model(where), own_tokenizer(where), {})
