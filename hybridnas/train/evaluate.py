"""Cross-entropy and its measurement: nats per token, float32, auxiliary losses never mixed in.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch, Source
from hybridnas.errors import DataError
from hybridnas.layers.mode import evaluating
from hybridnas.train.objective import Objective, check_causal

Autocast = Callable[[], AbstractContextManager[object]]


class Part(NamedTuple):
    """What one measurement finds of one part of the data."""

    loss: float  # nats per token
    accuracy: float  # share of places where the likeliest token is the right one
    tokens: int  # places that counted


class Score(NamedTuple):
    """What one measurement finds: of data in parts, the mean of the parts, each counting the same."""

    loss: float  # nats per token
    bits_per_byte: float | None  # None where the data has no bytes
    accuracy: float
    tokens: int
    parts: Mapping[str, Part] = MappingProxyType({})  # by name, where the data has several

    def figures(self) -> dict[str, float]:
        """Return each part's loss and accuracy as ``loss.NAME`` and ``accuracy.NAME``."""
        kinds = ("loss", "accuracy")
        return {f"{kind}.{name}": getattr(part, kind) for kind in kinds for name, part in self.parts.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    if device.type == "cpu":
        return batch
    mask_BL = None if batch.mask_BL is None else batch.mask_BL.to(device)
    return batch._replace(inputs_BL=batch.inputs_BL.to(device), targets_BL=batch.targets_BL.to(device), mask_BL=mask_BL)


def counted(batch: Batch) -> Tensor | int:
    """Return how many places of a batch count."""
    return batch.targets_BL.numel() if batch.mask_BL is None else batch.mask_BL.sum()


def autocast(precision: str, device: torch.device) -> Autocast:
    """Return what wraps a forward pass: bfloat16 autocast where ``precision`` and ``device`` ask for it, else nothing.

    Weights stay float32: they are the master copy, and blocks keep SSM parameters and routers in float32 themselves.
    """
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if not wanted:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    *,
    n_tokens: int,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    precision: str = "auto",
    heads: nn.ModuleDict | None = None,
    allow_noncausal: bool = False,
) -> Score:
    """Measure a model on the source's validation batches, the same ones at every call; leaves the mode as it was.

    ``model``: a HybridLM, or any module from ids (B, L) to logits (B, L, V). ``heads``: those of the source's tasks
    that were trained with it, where the source has any.

    Of data in several parts (``Source.valid_parts``) each is measured by itself, and the score is their mean: a part
    with few places counts as much as one with many. Raises DataError when a part has no validation tokens, ConfigError
    for a HybridLM with a layer that sees later tokens unless ``allow_noncausal``: its loss depends on the batch and is
    no language model's.
    """
    if isinstance(model, HybridLM):
        check_causal(model.arch, allow_noncausal)
    objective = Objective(model, heads, vocab_size=source.vocab_size)
    around = autocast(precision, device)
    with evaluating(objective):
        parts = {
            name: _measure(objective, batches, device, around)
            for name, batches in source.valid_parts(n_tokens, batch_size, seq_len).items()
        }
    if not parts or any(part.tokens == 0 for part in parts.values()):
        raise DataError(f"{source.describe()}: no validation tokens to measure; raise valid_fraction or add text")
    loss = sum(part.loss for part in parts.values()) / len(parts)
    accuracy = sum(part.accuracy for part in parts.values()) / len(parts)
    per_byte = source.bytes_per_token
    bits = loss / math.log(2) / per_byte if per_byte else None
    tokens = sum(part.tokens for part in parts.values())
    return Score(loss, bits, accuracy, tokens, {name: part for name, part in parts.items() if name})


def _measure(objective: Objective, batches: Iterable[Batch], device: torch.device, around: Autocast) -> Part:
    total, right, places = 0.0, 0, 0
    for raw in batches:
        batch = to_device(raw, device)
        with around():
            scores = objective.scores(batch)
        total += float(scores.loss.sum())
        right += int(scores.correct.sum())
        places += int(counted(batch))
    return Part(total / max(1, places), right / max(1, places), places)


def mean_stats(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average a forward pass's statistics over layers: ``layer03.E.dropped`` of all layers becomes ``dropped``.

    ``load_E``, the share of tokens per expert, becomes ``max_load``: the busiest expert in units of a fair share.
    """
    grouped: dict[str, list[Tensor]] = {}
    for name, value in stats.items():
        key = name.rpartition(".")[2]
        if key == "load_E":
            key, value = "max_load", value.max() * value.numel()
        if value.ndim == 0:
            grouped.setdefault(key, []).append(value.detach().float())
    return {key: torch.stack(values).mean() for key, values in grouped.items()}
