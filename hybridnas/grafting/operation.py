"""``hybridnas.graft``: edits a trained model's architecture, starts new blocks, fits them, and trains the result."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.layer import ResidualLayer
from hybridnas.arch.model import HybridLM
from hybridnas.arch.pattern import Pattern
from hybridnas.data.source import Source, SourceConfig, check_vocab, open_source, source_config
from hybridnas.errors import ConfigError, TrainingError
from hybridnas.grafting import initial
from hybridnas.grafting.config import FITTED, GraftConfig
from hybridnas.grafting.edits import Part, Plan, plan
from hybridnas.grafting.fitting import Fitted, fit_layers
from hybridnas.layers.block import Block
from hybridnas.train.config import TrainConfig
from hybridnas.train.distill import Teacher
from hybridnas.train.evaluate import evaluate
from hybridnas.train.fit import fit
from hybridnas.train.start import weights_digest

if TYPE_CHECKING:
    from hybridnas.train.callbacks import Callback
    from hybridnas.train.records import TrainResult

_FIT_STEP = 256  # tokens of a step of the fit, or one sequence
_FIT_DATA = 7919  # added to the seed: the fit reads the data in another order than the training after it


@dataclass
class Graft:
    """A model after its edits, before any further training.

    ``names``: parameter -> its name in the model before, for all that were kept. ``moments``: the optimizer's of
    these, where they were given. ``record``: what was done, as the model's lineage keeps it.
    """

    model: HybridLM
    plan: Plan
    names: dict[str, str]
    moments: dict[str, Tensor]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what was done in the place of something that does not apply


def graft(
    model: HybridLM,
    change: str | Pattern | Arch,
    data: str | Mapping[str, Any] | SourceConfig | Source | None = None,
    *,
    arch: Mapping[str, Any] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    train: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    **settings: Any,
) -> HybridLM:
    """Return a trained model with another architecture: what the change does not touch keeps its weights.

    ``change``: edits such as ``"3:A->G"``, ``"+2:F; -4"`` (:mod:`hybridnas.grafting.edits`), a whole pattern or an
    architecture, which is aligned with the model's by the fewest edits. ``data``: as :func:`hybridnas.fit` takes it;
    without it nothing is fitted, measured or trained. ``arch``: settings of new blocks, ``{"G": {"head_dim": 16}}``.

    ``settings``: fields of :class:`hybridnas.grafting.config.GraftConfig`: ``init`` (how new blocks start), ``tokens``
    (of a training afterwards, none by default), ``distill_logits`` and others. ``train``: fields of
    :class:`hybridnas.TrainConfig` for that training; its context is that of the fit, too. ``moments``: of the
    optimizer that trained the model, as a checkpoint has them: those of kept weights go on. ``folder``: of that
    training, which goes on there when the same call is made again.

    The model that is given stays as it is. The result has float32 weights where the model's are narrower, and a record
    of the graft in ``lineage``, which an export keeps.
    Raises PatternError for a change that cannot be read, ConfigError for one that does not fit the model, TrainingError
    where the training does not end.
    """
    config = GraftConfig.from_dict(settings)
    training = train_config(config, train, data)
    source = _source(data)
    found = transplant(model, change, source, config, arch=arch, moments=moments, training=training)
    if config.tokens and source is not None:
        fine_tune(found, model, source, config, training, folder=folder, callbacks=callbacks)
    return found.model


def train_config(config: GraftConfig, given: Mapping[str, Any] | None = None, data: Any = None) -> TrainConfig:
    """Return the settings of the training after a graft; raises ConfigError without data that they need."""
    if data is None and (config.needs_data or config.tokens):
        name = "tokens" if config.tokens else "init"
        raise ConfigError(
            f"graft {name}={getattr(config, name)} needs data to learn from, and none was given; give data='stdlib' or "
            f"another, or init='random' and tokens=0",
            field="data",
            got=None,
            allowed="data",
        )
    own = {"seed": config.seed, **{k: v for k, v in (given or {}).items() if v is not None}}
    if "tokens" in own:
        raise ConfigError(
            f"graft train.tokens={own['tokens']} is given as tokens=, of which 0 is no training",
            field="train.tokens",
            got=own["tokens"],
            allowed="tokens",
        )
    if config.tokens:
        own["tokens"] = config.tokens
    return TrainConfig.from_dict(own)


def transplant(
    model: HybridLM,
    change: str | Pattern | Arch,
    source: Source | None,
    config: GraftConfig,
    *,
    arch: Mapping[str, Any] | None = None,
    moments: Mapping[str, Tensor] | None = None,
    training: TrainConfig | None = None,
) -> Graft:
    """Return the edited model with its new blocks started, and fitted where ``config`` says so.

    ``init='auto'`` with data tries, kind of replacement by kind, every start that applies, fits it, and keeps the one
    of least validation loss; without data it takes the first that applies, unfitted, and says so.
    """
    training = TrainConfig() if training is None else training
    wanted = plan(model.arch, change, arch)
    _check_streams(wanted)
    if source is not None:
        check_vocab(source.vocab_size, model.arch.vocab_size)
        source.context(training.seq_len, training.seq_len)
    old = model if model.embedding.weight.dtype in (torch.float32, torch.float64) else copy.deepcopy(model).float()
    work = _Work(old, wanted, source, config, training)
    with torch.random.fork_rng(devices=[]):
        built = work.auto() if config.start is None else work.build(dict.fromkeys(work.kinds, config.start))
    names = _names(old, built.model, wanted)
    own = {
        f"{new}.{key}": moments[f"{name}.{key}"]
        for new, name in names.items()
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
        if moments is not None and f"{name}.{key}" in moments
    }
    record: dict[str, Any] = {
        "edits": list(wanted.edits),
        "parent": {
            "pattern": str(model.arch.pattern),
            "fingerprint": model.arch.fingerprint(),
            "weights": weights_digest(model),
        },
        "pattern": str(wanted.arch.pattern),
        "fingerprint": wanted.arch.fingerprint(),
        "init": config.init,
        "seed": config.seed,
        "layers": built.layers,
        "kept": len(names),
        "moments": bool(own),
        "fit_tokens": work.fit_tokens,
        "tokens": 0,
    }
    if source is not None:
        record["data"] = source.describe()
        record["loss"] = {"parent": work.loss(old), "start": work.loss(built.model)}
    built.model.lineage = (*model.lineage, record)
    return Graft(built.model, wanted, names, own, record, work.notes)


def fine_tune(
    found: Graft,
    before: HybridLM,
    source: Source,
    config: GraftConfig,
    training: TrainConfig,
    *,
    folder: str | Path | None = None,
    callbacks: Iterable[Callback] = (),
    max_seconds: float | None = None,
) -> TrainResult:
    """Train a grafted model in place, with the model before the graft as the teacher where ``config`` says so.

    Raises TrainingError where the training fails.
    """
    teacher = None
    if config.distill_logits or config.distill_hidden:
        layers = {at: max(origins) for at, origins in enumerate(found.plan.origins) if origins}
        teacher = Teacher(
            copy.deepcopy(before).to(found.model.embedding.weight),
            logits=config.distill_logits,
            hidden=config.distill_hidden,
            temperature=config.temperature,
            layers=layers,
        )
    result = fit(
        found.model,
        source,
        folder=folder,
        callbacks=callbacks,
        max_seconds=max_seconds,
        teacher=teacher,
        moments=found.moments or None,
        **training.to_dict(),
    )
    if result.status == "failed":
        raise TrainingError(f"the training after the graft failed: {result.reason}")
    if result.model is not None and result.evals:
        if result.model is not found.model:  # read back from the folder
            found.model.load_state_dict(result.model.state_dict())
        found.record["tokens"] = result.evals[-1].tokens
        found.record["loss"]["end"] = result.evals[-1].valid_loss
        found.record["distill"] = {"logits": config.distill_logits, "hidden": config.distill_hidden}
    found.model.eval()
    return result


Kind = tuple[str, str, str]  # letter before ("" where a block is inserted), letter after, the starts that apply


@dataclass
class _Built:
    model: HybridLM
    layers: list[dict[str, Any]]


class _Work:
    """The making of one graft: new blocks of one kind (letters before and after, starts that apply) start alike."""

    def __init__(
        self, old: HybridLM, wanted: Plan, source: Source | None, config: GraftConfig, training: TrainConfig
    ) -> None:
        self.old, self.plan, self.source, self.config, self.training = old, wanted, source, config, training
        self.fit_tokens = 0  # of all fits, those of starts that were not taken among them
        self.notes: list[str] = []
        self._losses: dict[HybridLM, float] = {}
        drawn = HybridLM(wanted.arch, impl=old.impl, seed=config.seed)
        self.drawn = drawn.to(old.embedding.weight.device, old.embedding.weight.dtype)
        self.kinds: dict[Kind, list[str]] = {}
        for at, part in self._new_parts():
            self.kinds.setdefault(
                self._kind(at, part), initial.starts_for(self._old_block(part), self._block(at, part))
            )

    def auto(self) -> _Built:
        """Return the graft with, for each kind of new block, the start of least loss after its fit."""
        ways = {kind: starts[0] for kind, starts in self.kinds.items()}
        open_ = {kind: starts for kind, starts in self.kinds.items() if len(starts) > 1 and kind[0]}
        if self.source is None:
            if open_:
                self.notes.append(
                    "no data was given, so that no start is measured and nothing fitted: "
                    + ", ".join(f"{kind[0]} to {kind[1]} starts by {ways[kind]}" for kind in open_)
                )
            return self.build(ways, fitted=False)
        best = self.build(ways)
        for kind, starts in open_.items():
            if ways[kind] == "copy" and all(
                layer["exact"] for layer in best.layers if (layer["from"], layer["block"]) == kind[:2]
            ):
                continue  # nothing can be better than the same function
            for start in starts[1:]:
                if start == "zero":
                    continue  # a layer that is left out is an edit of its own
                other = self.build({**ways, kind: start})
                if self.loss(other.model) < self.loss(best.model):
                    best, ways[kind] = other, start
        return best

    def build(self, ways: Mapping[Kind, str], *, fitted: bool | None = None) -> _Built:
        """Return the edited model with new blocks started as ``ways`` says, and fitted."""
        fitted = self.config.fits if fitted is None else fitted
        torch.manual_seed(self.config.seed)
        model = copy.deepcopy(self.drawn)
        _carry(self.old, model, self.plan)
        rows: list[dict[str, Any]] = []
        open_: dict[int, list[nn.Parameter]] = {}
        for at, part in self._new_parts():
            old, new = self._old_block(part), self._block(at, part, model)
            row, exact = self._start(at, part, old, new, ways[self._kind(at, part)])
            rows.append(row)
            if part.origin is not None and not exact and len(self.plan.origins[at]) == 1:
                open_.setdefault(at, []).extend(new.parameters())
        if fitted and self.source is not None and open_:
            found = self._fit(model, open_)
            for row in rows:
                if row["layer"] in found:
                    row["start"] += FITTED
                    row["error"] = list(found[row["layer"]])
        return _Built(model.eval(), rows)

    def _start(self, at: int, part: Part, old: Block | None, new: Block, name: str) -> tuple[dict[str, Any], bool]:
        """Start a block, by another way where the one asked for does not apply; returns its row, and if it is exact."""
        why = initial.start(name, old, new, self.config.noise)
        if why:
            instead = "zero" if part.origin is None else "random"
            if part.origin is not None:  # what is inserted has nothing to start from
                note = f"layer {at} ({new.letter} {new.name}) cannot start by {name}: {why}; it starts by {instead}"
                if note not in self.notes:
                    self.notes.append(note)
            name = instead if not initial.start(instead, old, new) else "random"
        gap = None if old is None else initial.difference(old, new)
        exact = gap is not None and gap < initial.EXACT
        letter = "" if part.origin is None else part.origin.slot.letter
        where = None if part.origin is None else part.origin.layer
        row = {"layer": at, "block": part.node.slot.letter, "from": letter, "from_layer": where, "start": name}
        return {**row, "exact": exact or (old is None and name == "zero")}, exact

    def _fit(self, model: HybridLM, open_: Mapping[int, list[nn.Parameter]]) -> dict[int, Fitted]:
        assert self.source is not None
        # Each place of the text is a target of its own: many small steps fit better than few large ones.
        rows = min(self.training.batch_size, max(1, _FIT_STEP // self.training.seq_len))
        size = rows * self.training.seq_len
        steps = -(-self.config.fit_tokens // size)
        self.fit_tokens += steps * size
        return fit_layers(
            self.old,
            model,
            {at: self.plan.origins[at][0] for at in open_},
            open_,
            self.source,
            steps=steps,
            batch_size=rows,
            seq_len=self.training.seq_len,
            lr=self.config.fit_lr,
            seed=self.config.seed + _FIT_DATA,
        )

    def loss(self, model: HybridLM) -> float:
        """Return a model's validation loss [nats per token], measured once."""
        assert self.source is not None
        if model not in self._losses:
            training = self.training
            self._losses[model] = evaluate(
                model,
                self.source,
                n_tokens=training.valid_tokens,
                batch_size=training.batch_size,
                seq_len=training.seq_len,
                device=model.embedding.weight.device,
                precision=training.precision,
                allow_noncausal=training.allow_noncausal,
            ).loss
        return self._losses[model]

    def _new_parts(self) -> list[tuple[int, Part]]:
        seen = {part.node.module for part in self.plan.parts if part.kept}  # shared: they keep their weights
        found = []
        for at, layer in enumerate(self.plan.layers):
            for part in layer:
                if not part.kept and part.node.module not in seen:
                    seen.add(part.node.module)
                    found.append((at, part))
        return found

    def _kind(self, at: int, part: Part) -> Kind:
        starts = initial.starts_for(self._old_block(part), self._block(at, part))
        return "" if part.origin is None else part.origin.slot.letter, part.node.slot.letter, " ".join(starts)

    def _block(self, at: int, part: Part, model: HybridLM | None = None) -> Block:
        return _block_at(self.drawn if model is None else model, at, part.node.branch, part.node.position)

    def _old_block(self, part: Part) -> Block | None:
        origin = part.origin
        return None if origin is None else _block_at(self.old, origin.layer, origin.branch, origin.position)


def _block_at(model: HybridLM, layer: int, branch: int, position: int) -> Block:
    branches: Any = cast(ResidualLayer, model.layers[layer]).branches
    return cast(Block, branches[branch][position])


def _twins(old: HybridLM, new: HybridLM, wanted: Plan) -> list[tuple[nn.Module, nn.Module]]:
    """Return the modules that a graft keeps, as (before, after): each has the same tensors in both."""
    pairs: list[tuple[nn.Module | None, nn.Module | None]] = [
        (old.embedding, new.embedding),
        (old.head, new.head),
        (old.final_norm, new.final_norm),
    ]
    for at, (layer, origins) in enumerate(zip(wanted.layers, wanted.origins, strict=True)):
        target = cast(ResidualLayer, new.layers[at])
        if len(origins) == 1:
            pairs.append((cast(ResidualLayer, old.layers[origins[0]]).norm, target.norm))
        for part in layer:
            origin, node = part.origin, part.node
            if origin is None:
                continue
            ours = cast(ResidualLayer, old.layers[origin.layer]).around_of(origin.branch, origin.position)
            theirs = target.around_of(node.branch, node.position)
            if ours is not None and theirs is not None:
                pairs += [(ours.canon, theirs.canon), (ours.norm, theirs.norm)]
            if part.kept:
                block = _block_at(old, origin.layer, origin.branch, origin.position)
                pairs.append((block, _block_at(new, at, node.branch, node.position)))
    return [(one, other) for one, other in pairs if one is not None and other is not None and _alike(one, other)]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    return [(n, t.shape) for n, t in one.state_dict().items()] == [(n, t.shape) for n, t in other.state_dict().items()]


@torch.no_grad()
def _carry(old: HybridLM, new: HybridLM, wanted: Plan) -> None:
    """Copy all that is kept; the norm of a layer that was made of several is the mean of theirs."""
    for one, other in _twins(old, new, wanted):
        theirs = other.state_dict(keep_vars=True)
        for name, tensor in one.state_dict(keep_vars=True).items():
            theirs[name].data = tensor.detach().clone()
            theirs[name].requires_grad_(tensor.requires_grad)
    if old.meta_tokens is not None and new.meta_tokens is not None:
        new.meta_tokens.copy_(old.meta_tokens)
    for at, origins in enumerate(wanted.origins):
        norms = [cast(ResidualLayer, old.layers[origin]).norm for origin in origins]
        target = cast(ResidualLayer, new.layers[at]).norm
        known = [norm.state_dict() for norm in norms if norm is not None]
        if len(origins) > 1 and target is not None and known:
            for name, tensor in target.state_dict().items():
                tensor.copy_(torch.stack([one[name] for one in known]).mean(0))


def _names(old: HybridLM, new: HybridLM, wanted: Plan) -> dict[str, str]:
    """Return for every parameter that was kept its name before the graft."""
    ours = {id(p): name for name, p in old.named_parameters()}
    theirs = {id(p): name for name, p in new.named_parameters()}
    found = {}
    for one, other in _twins(old, new, wanted):
        for (_, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
            found[theirs[id(b)]] = ours[id(a)]
    if old.meta_tokens is not None:
        found["meta_tokens"] = "meta_tokens"
    return found


def _check_streams(wanted: Plan) -> None:
    """Raise ConfigError where an inserted layer would change the stream whatever it adds."""
    for layer, origins in zip(wanted.layers, wanted.origins, strict=True):
        node = layer[0].node
        if not origins and (node.config.norm_position == "stream" or node.config.stream_multiplier != 1):
            name = "norm_position" if node.config.norm_position == "stream" else "stream_multiplier"
            raise ConfigError(
                f"graft cannot insert {node.where}: with {name}={getattr(node.config, name)} a layer that adds nothing "
                f"still changes the stream; replace a layer, or insert one with norm_position=pre",
                field=name,
                got=getattr(node.config, name),
                allowed="pre" if name == "norm_position" else 1.0,
            )


def _source(data: Any) -> Source | None:
    if data is None or isinstance(data, Source):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    return open_source(data if isinstance(data, SourceConfig) else source_config(data))
