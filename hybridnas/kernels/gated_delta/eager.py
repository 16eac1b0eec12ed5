"""Gated linear recurrences in matrix products: quadratic inside a chunk, one state from chunk to chunk.

Shapes: B batch, H value heads, N chunks, T steps of a chunk, K channels of a key, V channels of a value.

With P_ij the decay from step j to step i, and S the state before a chunk, the values that the delta rule writes solve
(I + diag(beta) tril(P * k k^T, -1)) E = diag(beta) (V - K' S), K' the keys times the decay from the chunk's start: a
triangular system, solved once for [diag(beta) V, diag(beta) K'] in all chunks. No decay is the quotient of two others,
nor the exponential of a difference of sums: each is the exponential of a sum of its own steps, so that nothing
overflows and steps that forget everything leave the digits of others.

Sources: the chunked delta rule, Yang et al. 2024, arXiv 2406.06484, section 3; with decays arXiv 2412.06464, section
3.3; by channel, arXiv 2312.06635, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridnas.kernels.gated_delta.reference import Inputs, gated_delta_reference

_PRODUCTS = 8  # steps from which matrix products are faster than sums of products


def gated_delta_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V), differentiable by autograd.

    For a backward the inputs alone are kept and everything is computed again: a third more time, a seventh of the
    memory that the chunks' products take.
    """
    if inputs.q.shape[1] <= 1:  # one step is the recurrence itself
        return gated_delta_reference(inputs)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _chunked(inputs)
    return recomputed(_chunked, inputs)


def recomputed(chunked: Callable[[Any], tuple[Tensor, Tensor]], inputs: Any) -> tuple[Tensor, Tensor]:
    """Return what ``chunked`` makes of an operation's inputs, of which alone a backward keeps; it computes again."""
    found: tuple[Tensor, Tensor] = checkpoint(
        lambda *floating: chunked(type(inputs)(*floating, *inputs[len(floating) :])),
        *inputs.floating,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return found


def _chunked(inputs: Inputs) -> tuple[Tensor, Tensor]:
    length = inputs.q.shape[1]
    steps = 1 << (min(inputs.chunk_size, length) - 1).bit_length()
    q, k, v = (by_chunk(t, steps) for t in inputs.by_head())
    log = inputs.log_decay_by_step()
    readers = q[None] if inputs.beta is None else torch.stack([q, k])  # with the delta rule keys read the state too
    through = None
    if log is None:
        scores, from_start, to_end_k = readers @ k.transpose(-1, -2), readers, k
    else:
        log = by_chunk(log if log.dim() == 4 else log[..., None], steps)  # (B, H, N, T, 1 or K)
        decay_from_start = log.cumsum(-2).exp()
        through = decay_from_start[..., -1, :, None]
        from_start, to_end_k = readers * decay_from_start, k * sums_to_end(log).exp()
        by_channel = log.shape[-1] > 1
        scores = (
            decayed_scores(readers, k, log)
            if by_channel
            else (readers @ k.transpose(-1, -2)) * _within(log.squeeze(-1))
        )
    S = inputs.start()
    before, written = [], v
    through_N = [None] * v.shape[2] if through is None else list(through.unbind(2))
    writes = to_end_k.transpose(-1, -2)
    if inputs.beta is None:
        for keep, added_BHKV in zip(through_N, (writes @ v).unbind(2), strict=True):
            before.append(S)
            S = S + added_BHKV if keep is None else torch.addcmul(added_BHKV, keep, S)
    else:
        beta = by_chunk(inputs.beta.to(inputs.dtype)[..., None], steps)
        right = torch.cat([v, from_start[1]], -1) * beta
        solved = torch.linalg.solve_triangular(scores[1].tril(-1) * beta, right, upper=False, unitriangular=True)
        values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
        parts = []
        for keep, to_end_BHKT, u, w in zip(through_N, writes.unbind(2), values.unbind(2), keys.unbind(2), strict=True):
            before.append(S)
            parts.append(u - w @ S)
            added_BHKV = to_end_BHKT @ parts[-1]
            S = S + added_BHKV if keep is None else torch.addcmul(added_BHKV, keep, S)
        written = torch.stack(parts, 2)
    o = from_start[0] @ torch.stack(before, 2) + scores[0].tril() @ written
    o_BLHV = o.flatten(2, 3).transpose(1, 2)[:, :length]
    return o_BLHV.to(inputs.v.dtype), S


def by_chunk(tensor_BLHX: Tensor, steps: int) -> Tensor:
    """Return (B, H, N, T, X) with zeros for what the last chunk lacks: steps that decay and write nothing."""
    missing = -tensor_BLHX.shape[1] % steps
    if missing:
        tensor_BLHX = F.pad(tensor_BLHX, (0, 0, 0, 0, 0, missing))
    batch, length, heads, width = tensor_BLHX.shape
    return tensor_BLHX.reshape(batch, length // steps, steps, heads, width).permute(0, 3, 1, 2, 4)


def sums_to_end(log: Tensor) -> Tensor:
    """Return for each step the sum of the steps after it, (..., T, X) as ``log``."""
    return F.pad(log[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _within(log: Tensor) -> Tensor:
    """Return the decay from step j to step i, (..., T, T) for ``log`` (..., T), zero where j is later."""
    steps = log.shape[-1]
    future_TT = torch.ones(steps, steps, dtype=torch.bool, device=log.device).triu()
    within = log[..., :, None].expand(*log.shape, steps).masked_fill(future_TT, 0.0).cumsum(-2)
    # masked before exp, never after, so that neither the value nor the gradient can become inf * 0
    return within.masked_fill(future_TT.triu(1), float("-inf")).exp()


def decayed_scores(readers: Tensor, k: Tensor, log: Tensor) -> Tensor:
    """Return sum over k of readers_ik k_jk (decay of channel k from j to i), (..., T, T), zero where j is later.

    T is a power of two. Two neighboring blocks of steps join at a time: what the later one reads of the earlier is a
    product of readers that decay from the boundary and keys that decay to it.
    """
    steps, size = k.shape[-2:]
    scores = (readers * k).sum(-1)[..., None, None]  # (..., blocks, 1, 1)
    width = 1
    while width < steps:
        halves = (steps // (2 * width), 2, width, size)
        early_k = k.reshape(*k.shape[:-2], *halves).select(-3, 0)
        early_log, late_log = log.reshape(*k.shape[:-2], *halves).unbind(-3)
        late = readers.reshape(*readers.shape[:-2], *halves).select(-3, 1) * late_log.cumsum(-2).exp()
        early = early_k * sums_to_end(early_log).exp()
        if width < _PRODUCTS:
            across = (late.unsqueeze(-2) * early.unsqueeze(-3)).sum(-1)
        else:
            across = late @ early.transpose(-1, -2)
        before, after = scores.reshape(*across.shape[:-2], 2, width, width).unbind(-3)
        scores = torch.cat([F.pad(before, (0, width)), torch.cat([across, after], -1)], -2)
        width *= 2
    return scores.squeeze(-3)
