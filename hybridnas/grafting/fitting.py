"""Activation regression: new blocks learn what the old ones add to the residual stream, on real inputs (2506.05340).

Every new layer reads the stream that the model before the graft has at that place, so that layers are fitted
independently of each other, all in one pass over the data.

Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.arch.layer import ResidualLayer
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch, Source
from hybridnas.layers.block import Aux
from hybridnas.layers.mode import evaluating
from hybridnas.train.evaluate import to_device

_CLIP = 1.0  # largest norm of a layer's gradients
_WARMUP = 0.05  # of the steps


class Fitted(NamedTuple):
    """What is left of the old layer's output, squared and over its square: 0 is the old layer, 1 is nothing at all."""

    before: float
    after: float


def fit_layers(
    old: HybridLM,
    new: HybridLM,
    pairs: Mapping[int, int],
    parameters: Mapping[int, Sequence[nn.Parameter]],
    source: Source,
    *,
    steps: int,
    batch_size: int,
    seq_len: int,
    lr: float,
    seed: int,
) -> dict[int, Fitted]:
    """Fit layers of ``new`` to layers of ``old`` (``pairs``: new -> old), by their ``parameters`` alone.

    The error before and after is measured on one batch that is not fitted on. Random draws come from torch's global
    generator, which the caller seeds.
    """
    device = old.embedding.weight.device
    held_out = to_device(source.train_batch(steps, batch_size, seq_len, seed), device)
    before = _errors(old, new, pairs, held_out)
    optimizers = {at: torch.optim.AdamW(parameters[at], lr=lr, weight_decay=0.0) for at in pairs}
    with evaluating(old):
        for step in range(steps):
            batch = to_device(source.train_batch(step, batch_size, seq_len, seed), device)
            rate = lr * min(1.0, (step + 1) / max(1.0, _WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
            seen = _seen(old, pairs.values(), batch)
            for at, place in pairs.items():
                x_BLD, wanted_BLD = seen[place]
                found_BLD, auxes = _added(new, at, x_BLD, batch)
                loss = (found_BLD - wanted_BLD).square().sum() / wanted_BLD.square().sum().clamp(min=1e-12)
                loss = loss + sum((value for aux in auxes for value in aux.losses.values()), start=loss.new_zeros(()))
                optimizer = optimizers[at]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters[at], _CLIP)
                optimizer.param_groups[0]["lr"] = rate
                optimizer.step()
    after = _errors(old, new, pairs, held_out)
    return {at: Fitted(before[at], after[at]) for at in pairs}


@torch.no_grad()
def _errors(old: HybridLM, new: HybridLM, pairs: Mapping[int, int], batch: Batch) -> dict[int, float]:
    found = {}
    with evaluating(old), evaluating(new):
        seen = _seen(old, pairs.values(), batch)
        for at, place in pairs.items():
            x_BLD, wanted_BLD = seen[place]
            left = (_added(new, at, x_BLD, batch)[0] - wanted_BLD).square().sum()
            found[at] = float(left / wanted_BLD.square().sum().clamp(min=1e-12))
    return found


def _added(new: HybridLM, at: int, x_BLD: Tensor, batch: Batch) -> tuple[Tensor, list[Aux]]:
    """Return what a layer adds to the stream, and its extras."""
    layer = cast(ResidualLayer, new.layers[at])
    y_BLD, auxes = layer(x_BLD, None, [], batch.segments_BL)
    return y_BLD - x_BLD, [aux for _, aux in auxes]


@torch.no_grad()
def _seen(model: HybridLM, layers: Any, batch: Batch) -> dict[int, tuple[Tensor, Tensor]]:
    """Return for each layer the stream that it reads and what it adds, over a batch."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with _watching(model, sorted(set(layers)), found):
        model.hidden(batch.inputs_BL, segments_BL=batch.segments_BL)
    return found


@contextmanager
def _watching(model: HybridLM, layers: Sequence[int], found: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    def keeper(index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[index] = (args[0], output[0] - args[0])

        return keep

    hooks = [model.layers[index].register_forward_hook(keeper(index)) for index in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
