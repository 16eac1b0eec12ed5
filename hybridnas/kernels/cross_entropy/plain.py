"""Cross-entropy of given logits: keeps nothing but the logits for the backward, where torch keeps their logarithms too.

A custom operator for autograd, compile and export. Shapes: N tokens, T tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._inputs import state_dtype
from hybridnas.kernels.cross_entropy import rows

_CHUNK_BYTES = 1 << 20  # of float32: rows that stay in the cache from one pass to the next


def _chunk_rows(logits: Tensor) -> int:
    """Return how many rows are done at once; all of them on a GPU, where a row is one program."""
    return max(1, _CHUNK_BYTES // (4 * logits.shape[1]) if logits.device.type == "cpu" else logits.shape[0])


@torch.library.custom_op(
    "hybridnas::cross_entropy",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, int ignore_index, bool triton) -> (Tensor, Tensor)",
)
def _forward_op(*args: Any) -> tuple[Tensor, Tensor]:
    logits, targets, ignore_index, triton = args
    (count, vocabulary), size, wide = logits.shape, _chunk_rows(logits), state_dtype(logits)
    counts, run = targets != ignore_index, rows.row_function(triton)
    rows.require_in_vocabulary(targets[counts] if logits.device.type == "cpu" else targets, vocabulary, ignore_index)
    index = targets.masked_fill(~counts, 0)
    loss, logsumexp = logits.new_empty(count, dtype=wide), logits.new_empty(count, dtype=wide)
    memory = logits.new_empty(min(size, count), vocabulary, dtype=wide)
    for part in rows.slices(count, size):
        out_TV = memory[: part.stop - part.start]
        loss[part], logsumexp[part] = run(logits[part], index[part], None, out_TV, gradient=False)
    zero = torch.zeros_like(loss)
    return torch.where(counts, loss, zero), torch.where(counts, logsumexp, zero)


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    logits = args[0]
    loss = logits.new_empty(logits.shape[0], dtype=state_dtype(logits))
    return loss, torch.empty_like(loss)


@torch.library.custom_op(
    "hybridnas::cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor upstream, int ignore_index, bool triton) -> Tensor",
)
def _backward_op(*args: Any) -> Tensor:
    logits, targets, upstream, ignore_index, triton = args
    counts, run = targets != ignore_index, rows.row_function(triton)
    index, scale = targets.masked_fill(~counts, 0), torch.where(counts, upstream, torch.zeros_like(upstream))
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in rows.slices(logits.shape[0], _chunk_rows(logits)):
        run(logits[part], index[part], scale[part], dlogits[part], gradient=True)
    return dlogits


@_backward_op.register_fake
def _(*args: Any) -> Tensor:
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets)


def _backward(ctx: Any, dloss_N: Tensor, _: Any) -> tuple[Any, ...]:
    return torch.ops.hybridnas.cross_entropy_backward(*ctx.saved_tensors[:2], dloss_N, *ctx.options), None, None, None


torch.library.register_autograd("hybridnas::cross_entropy", _backward, setup_context=_setup)


def cross_entropy_torch(
    logits_NV: Tensor, targets_N: Tensor, ignore_index: int, *, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) and the logarithms of the normalisers (N,), 0 where ignored."""
    loss_N, logsumexp_N = torch.ops.hybridnas.cross_entropy(logits_NV, targets_N, ignore_index, triton)
    return loss_N, logsumexp_N
