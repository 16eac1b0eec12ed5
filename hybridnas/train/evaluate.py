"""Cross-entropy and its measurement: nats per token, float32, auxiliary losses never mixed in.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch, Source
from hybridnas.errors import DataError
from hybridnas.kernels.cross_entropy import linear_cross_entropy, token_scores

Autocast = Callable[[], AbstractContextManager[object]]


class Score(NamedTuple):
    """What one measurement finds; ``bits_per_byte`` is None where the data has no bytes."""

    loss: float  # nats per token
    bits_per_byte: float | None
    accuracy: float  # share of places where the likeliest token is the right one
    tokens: int  # places that counted


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    inputs, targets, mask = batch
    if device.type == "cpu":
        return batch
    return Batch(inputs.to(device), targets.to(device), None if mask is None else mask.to(device))


def counted(batch: Batch) -> Tensor | int:
    """Return how many places of a batch count."""
    return batch.targets_BL.numel() if batch.mask_BL is None else batch.mask_BL.sum()


def cross_entropy_sum(x_BLD: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
    """Return the sum of ``-log p(target)`` over the places that count [nats], computed in float32.

    x (B, L, D) is what the head reads: all logits exist at once only where that is faster.
    """
    return linear_cross_entropy(x_BLD, head_VD, batch.targets_BL, mask=batch.mask_BL, reduction="sum")


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
    model: HybridLM,
    source: Source,
    *,
    n_tokens: int,
    batch_size: int,
    seq_len: int,
    device: torch.device,
    precision: str = "auto",
) -> Score:
    """Measure the model on the source's validation batches, the same ones at every call; leaves the mode as it was.

    Raises DataError when the source has no validation tokens.
    """
    was_training = model.training
    model.eval()
    around = autocast(precision, device)
    total, right, places = 0.0, 0, 0
    try:
        for raw in source.valid_batches(n_tokens, batch_size, seq_len):
            batch = to_device(raw, device)
            with around():
                x_BLD = model.hidden(batch.inputs_BL).x_BLD
                scores = token_scores(x_BLD, model.head.weight, batch.targets_BL, mask=batch.mask_BL)
            total += float(scores.loss.sum())
            right += int(scores.correct.sum())
            places += int(counted(batch))
    finally:
        model.train(was_training)
    if places == 0:
        raise DataError(f"{source.describe()}: no validation tokens to measure; raise valid_fraction or add text")
    loss = total / places
    per_byte = source.bytes_per_token
    return Score(loss, loss / math.log(2) / per_byte if per_byte else None, right / places, places)


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
