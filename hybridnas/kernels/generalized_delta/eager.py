"""RWKV-7's recurrence in matrix products: quadratic inside a chunk, one state from chunk to chunk.

Shapes: B batch, H heads, N chunks, T steps of a chunk, K channels of a key, V channels of a value.

With P_ij the decay by channel from step j to step i, what is read of the state at the steps of a chunk, U, solves
(I - tril(P * a b^T, -1)) U = tril(P * a k^T, -1) V + A' S, where a reads what the step before leaves and A' is a times
the decay from the chunk's start: a triangular system, solved once for all chunks. Decays are those of
``gated_delta.eager``: exponentials of sums of their own steps.

Source: the chunked delta rule of arXiv 2406.06484, section 3, with two directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels.gated_delta.eager import by_chunk, decayed_scores, recomputed, sums_to_end
from hybridnas.kernels.generalized_delta.reference import Inputs, generalized_delta_reference


def generalized_delta_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V), differentiable by autograd.

    For a backward the inputs alone are kept and everything is computed again.
    """
    if inputs.q.shape[1] <= 1:  # one step is the recurrence itself
        return generalized_delta_reference(inputs)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _chunked(inputs)
    return recomputed(_chunked, inputs)


def _chunked(inputs: Inputs) -> tuple[Tensor, Tensor]:
    length = inputs.q.shape[1]
    steps = 1 << (min(inputs.chunk_size, length) - 1).bit_length()
    q, k, v, log, a, b = (by_chunk(t, steps) for t in inputs.by_step())
    decay_from_start = log.cumsum(-2).exp()
    through = decay_from_start[..., -1, :, None]
    decay_to_end = sums_to_end(log).exp()
    # a of step t reads what step t - 1 leaves: as a reader of that step, moved back down afterwards
    readers = torch.stack([q, F.pad(a[..., 1:, :], (0, 0, 0, 1))])
    of_keys, of_b = (decayed_scores(readers, key, log) for key in (k, b))
    read_keys, read_b = _later(of_keys[1]), _later(of_b[1])
    a_from_start = a * F.pad(decay_from_start[..., :-1, :], (0, 0, 1, 0), value=1.0)
    right = torch.cat([read_keys @ v, a_from_start], -1)
    solved = torch.linalg.solve_triangular(-read_b, right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    k_to_end, b_to_end = ((t * decay_to_end).transpose(-1, -2) for t in (k, b))
    S = inputs.start()
    before, read = [], []
    pieces = zip(*(t.unbind(2) for t in (k_to_end @ v, b_to_end, values, keys, through)), strict=True)
    for added_BHKV, b_BHKT, values_BHTV, keys_BHTK, keep_BHK1 in pieces:
        before.append(S)
        read.append(values_BHTV + keys_BHTK @ S)
        S = torch.addcmul(added_BHKV + b_BHKT @ read[-1], keep_BHK1, S)
    o = (q * decay_from_start) @ torch.stack(before, 2) + of_keys[0] @ v + of_b[0] @ torch.stack(read, 2)
    o_BLHV = o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
    return o_BLHV.to(inputs.v.dtype), S


def _later(scores: Tensor) -> Tensor:
    """Return (..., T, T) with row t what row t - 1 was, and zeros first."""
    return F.pad(scores[..., :-1, :], (0, 0, 1, 0))
