"""What is trained and measured of a model: cross-entropy of its predictions, auxiliary losses and statistics beside it.

A :class:`HybridLM` is read before its output matrix, so that the loss computes logits chunk by chunk, and through the
task's head where a batch asks for one. Any other module has to map ids (B, L) to logits (B, L, V): as a tensor, as an
object with ``.logits``, or as a tuple whose first element they are.
Shapes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch, Source, check_vocab
from hybridnas.errors import ConfigError, DataError
from hybridnas.hardware import Impl
from hybridnas.kernels.cross_entropy import TokenScores, cross_entropy, linear_cross_entropy, token_scores

if TYPE_CHECKING:
    from hybridnas.train.distill import Teacher


class Loss(NamedTuple):
    """One forward pass: the sum of ``-log p(target)`` over the places that count [nats], float32, and extras."""

    total: Tensor
    losses: Mapping[str, Tensor]  # auxiliary losses, already weighted
    stats: Mapping[str, Tensor]  # e.g. routing statistics, detached


class Objective(nn.Module):
    """A model and its task's heads, as one module from a batch to a loss: what an optimizer and DDP see."""

    def __init__(
        self,
        model: nn.Module,
        heads: nn.ModuleDict | None = None,
        *,
        vocab_size: int | None = None,
        compile_model: bool = False,
        z_loss: float = 0.0,
        teacher: Teacher | None = None,
    ) -> None:
        """``vocab_size``: of the data, which a module that is no HybridLM must have logits for.

        ``z_loss``: weight of the squared logarithm of the logits' normalizer in what ``forward`` returns.
        ``teacher``: another model whose agreement is an auxiliary loss; of a HybridLM alone.
        """
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self.z_loss = z_loss
        self.teacher = teacher
        self.heads = heads if heads is not None else nn.ModuleDict()
        own: Callable[..., Any] = model.hidden if isinstance(model, HybridLM) else model
        compiled = torch.compile(own) if compile_model else own

        def read(batch: Batch) -> Any:
            if batch.segments_BL is None:
                return compiled(batch.inputs_BL)
            name = "segments_BL" if isinstance(model, HybridLM) else _segments_of(model)
            return compiled(batch.inputs_BL, **{name: batch.segments_BL})

        self._read = read  # a function: torch would register a module a second time

    def forward(self, batch: Batch) -> Loss:
        """Return the loss of a batch, differentiable."""
        if not isinstance(self.model, HybridLM):
            return Loss(self._cross_entropy(self._logits(batch), batch, "sum", self.z_loss), {}, {})
        losses: dict[str, Tensor] = {}
        if self.teacher is None:
            hidden = self._read(batch)
        else:
            with self.teacher.watching(self.model) as streams:
                hidden = self._read(batch)
            losses = self.teacher.losses(batch, self.model, hidden.x_BLD, streams)
        x_BLD = self._through_head(hidden.x_BLD, batch)
        if batch.values_BL is not None:
            total = half_squares(x_BLD[..., 0], batch).sum()
        elif self._linear_head:
            total = cross_entropy_sum(x_BLD, self.model.head.weight, batch, self.model.loss_impl, z_loss=self.z_loss)
        else:
            total = self._cross_entropy(self.model.head(x_BLD), batch, "sum", self.z_loss)
        return Loss(total, {**hidden.aux.losses, **losses}, hidden.aux.stats)

    @torch.no_grad()
    def scores(self, batch: Batch) -> TokenScores:
        """Return each place's loss and whether its likeliest token is right; 0 and False where it does not count."""
        if isinstance(self.model, HybridLM):
            x_BLD = self._through_head(self.model.hidden(batch.inputs_BL, segments_BL=batch.segments_BL).x_BLD, batch)
            if self._linear_head:
                head_VD, impl = self.model.head.weight, self.model.loss_impl
                return token_scores(x_BLD, head_VD, batch.targets_BL, mask=batch.mask_BL, impl=impl)
            logits_BLV = self.model.head(x_BLD)
        else:
            logits_BLV = self._logits(batch)
        mask_BL = torch.ones_like(batch.targets_BL, dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL
        loss_BL = self._cross_entropy(logits_BLV, batch, "none")
        correct_BL = (logits_BLV.argmax(dim=-1) == batch.targets_BL) & mask_BL
        return TokenScores(loss_BL, torch.logsumexp(logits_BLV.float(), dim=-1), correct_BL)

    @torch.no_grad()
    def numbers(self, batch: Batch) -> Tensor:
        """Return the numbers that are predicted of a batch with ``values_BL``, float32 (B, L)."""
        if not isinstance(self.model, HybridLM):
            self._logits(batch)  # refuses it
            raise AssertionError("a module with logits has no numbers")
        hidden = self.model.hidden(batch.inputs_BL, segments_BL=batch.segments_BL)
        return self._through_head(hidden.x_BLD, batch)[..., 0].float()

    @property
    def _linear_head(self) -> bool:
        """Whether logits are the head's matrix times what it reads, so that a loss may take them in chunks."""
        return isinstance(self.model, HybridLM) and self.model.arch.model.final_softcap is None

    def _cross_entropy(self, logits_BLV: Tensor, batch: Batch, reduction: str, z_loss: float = 0.0) -> Tensor:
        impl = self.model.loss_impl if isinstance(self.model, HybridLM) else Impl.AUTO
        return cross_entropy(
            logits_BLV, batch.targets_BL, mask=batch.mask_BL, reduction=reduction, z_loss=z_loss, impl=impl
        )

    def _through_head(self, x_BLD: Tensor, batch: Batch) -> Tensor:
        if batch.head is None:
            return x_BLD
        if batch.head not in self.heads:
            raise DataError(
                f"this data is read through a task head {batch.head!r} that is trained with the model and stays with "
                f"its run: this model has none; train it on the data, whose measurements are the score",
                field="heads",
                got=list(self.heads),
                allowed=batch.head,
            )
        y_BLD: Tensor = self.heads[batch.head](x_BLD)
        return y_BLD

    def _logits(self, batch: Batch) -> Tensor:
        if batch.head is not None:
            raise DataError(
                f"this data is read through a task head {batch.head!r} between a model and its output matrix, which "
                f"only a HybridLM has: {type(self.model).__name__} gives logits; choose other data",
                field="model",
                got=type(self.model).__name__,
                allowed="HybridLM",
            )
        try:
            output = self._read(batch)
        except IndexError as error:
            vocab_size = self.vocab_size or int(batch.inputs_BL.max()) + 1
            raise _too_small(self.model, batch.inputs_BL, vocab_size) or error from None
        logits_BLV = logits_of(output, self.model)
        if logits_BLV.shape[:-1] != batch.inputs_BL.shape:
            raise ConfigError(
                f"{type(self.model).__name__} must map ids {tuple(batch.inputs_BL.shape)} to logits (B, L, V), "
                f"got {tuple(logits_BLV.shape)}",
                field="model",
                got=tuple(logits_BLV.shape),
                allowed="(B, L, V)",
            )
        if self.vocab_size is not None:
            check_vocab(self.vocab_size, logits_BLV.shape[-1])
        return logits_BLV


def cross_entropy_sum(
    x_BLD: Tensor, head_VD: Tensor, batch: Batch, impl: Impl = Impl.AUTO, *, z_loss: float = 0.0
) -> Tensor:
    """Return the sum of ``-log p(target)`` over the places that count [nats], computed in float32.

    ``z_loss`` as in :func:`hybridnas.kernels.cross_entropy.linear_cross_entropy`.
    x (B, L, D) is what the output matrix reads: all logits exist at once only where that is faster.
    """
    return linear_cross_entropy(
        x_BLD, head_VD, batch.targets_BL, mask=batch.mask_BL, reduction="sum", z_loss=z_loss, impl=impl
    )


def half_squares(predicted_BL: Tensor, batch: Batch) -> Tensor:
    """Return half the squared error at each place, 0 where it does not count, float32 (B, L).

    It is -log p of a normal distribution of variance 1 less its constant, so in nats as every other loss.
    """
    assert batch.values_BL is not None and batch.mask_BL is not None
    return (0.5 * (predicted_BL.float() - batch.values_BL).square()) * batch.mask_BL


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """Return the logits in what a module returned; raises ConfigError for anything that holds none."""
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"{type(model).__name__} returned {type(output).__name__}; a model must return logits (B, L, V), an object "
            f"with .logits, or a tuple whose first element they are",
            field="model",
            got=type(output).__name__,
            allowed="logits, an object with .logits, or a tuple",
        )
    return found


def _segments_of(model: nn.Module) -> str:
    """Return the name of the parameter of documents; raises ConfigError for a module whose forward has none."""
    if "segments" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"data.pack=documents packs documents that must not see each other, and {type(model).__name__}.forward "
            f"has no parameter segments (B, L) to be told by; leave data.pack out, or train a HybridLM",
            field="data.pack",
            got="documents",
            allowed=None,
        )
    return "segments"


def _too_small(model: nn.Module, ids_BL: Tensor, vocab_size: int) -> ConfigError | None:
    """Return the error for a module with an embedding that is too small for these ids or their positions, or None."""
    rows = {name: one.num_embeddings for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
    if not any(count < max(vocab_size, ids_BL.shape[1]) for count in rows.values()):
        return None
    listed = ", ".join(f"{name or 'the model'} {count}" for name, count in rows.items())
    return ConfigError(
        f"{type(model).__name__} cannot look up ids {tuple(ids_BL.shape)} of 0 to {vocab_size - 1}: an embedding of "
        f"tokens needs {vocab_size} rows and one of positions {ids_BL.shape[1]}; it has {listed}",
        field="model",
        got=rows,
        allowed=f">= {vocab_size}",
    )


def check_causal(arch: Arch, allowed: bool) -> None:
    """Raise ConfigError for an architecture with a layer that sees later tokens, unless that is ``allowed``.

    Predicting a token from a vector that has seen it is no language modelling: such losses depend on what else is in
    the batch, and compare with no causal model's.
    """
    reason = None if allowed else why_noncausal(arch)
    if reason is not None:
        raise ConfigError(
            f"{reason}, or allow_noncausal=True (train.allow_noncausal=true on train's command line)",
            field="allow_noncausal",
            got=False,
            allowed=True,
        )


def why_noncausal(arch: Arch) -> str | None:
    """Return the sentence that names the first layer that sees later tokens; None where there is none."""
    for node in arch.nodes:
        if not node.config.causal:
            return (
                f"{node.where} is not causal: its outputs depend on later tokens of the batch, so its loss is no "
                f"language model's; use a causal setting (for moe: router='switch')"
            )
    return None


def make_heads(source: Source, model: nn.Module, seed: int) -> nn.ModuleDict:
    """Return the heads of the source's tasks for a model's width, with weights drawn from ``seed``, on its device."""
    heads = nn.ModuleDict()
    if isinstance(model, HybridLM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads.update(source.heads(model.arch.d_model))
        heads.to(model.head.weight.device)
    return heads
