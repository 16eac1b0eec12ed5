"""RWKV-7's recurrence step by step: the specification.

Shapes: B batch, L length, H heads, K channels of a key, V channels of a value.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        S (K, V), 0 where a document begins
    o_t = S_t^T q_t

Source: arXiv 2503.14456, equations of the state in section 3, with a = -kappa, b = kappa * rate; the state transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, empty_result, state_dtype


class Inputs(NamedTuple):
    """The arguments of the recurrence, in the order of ``generalized_delta``."""

    q: Tensor  # (B, L, H, K), as k, log_decay, a and b
    k: Tensor
    v: Tensor  # (B, L, H, V)
    log_decay: Tensor
    a: Tensor  # along what the memory is read
    b: Tensor  # along what is added of what was read
    initial_state: Tensor | None = None  # (B, H, K, V)
    seq_idx: Tensor | None = None  # (B, L) integers
    chunk_size: int = 64  # steps of a chunk, where the form has chunks

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The seven inputs that have a gradient."""
        return self[:7]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums."""
        return state_dtype(*self[:6])

    def by_step(self) -> tuple[Tensor, ...]:
        """Return the first six in ``dtype``; where a document begins the decay is -inf and nothing is read."""
        q, k, v, log_decay, a, b = (t.to(self.dtype) for t in self[:6])
        if self.seq_idx is not None:
            begins_BL11 = boundaries(self.seq_idx)[..., None, None]
            log_decay, a = log_decay.masked_fill(begins_BL11, float("-inf")), a.masked_fill(begins_BL11, 0.0)
        return q, k, v, log_decay, a, b

    def start(self) -> Tensor:
        """Return the state before the first step (B, H, K, V) in ``dtype``."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        shape = (self.v.shape[0], self.v.shape[2], self.k.shape[3], self.v.shape[3])
        return self.v.new_zeros(shape, dtype=self.dtype)


def generalized_delta_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V), one step at a time."""
    S_BHKV = inputs.start()
    if inputs.q.shape[1] == 0:
        return empty_result(tuple(inputs.v.shape), inputs.v, *inputs.floating), S_BHKV
    outputs = []
    for q_BHK, k_BHK, v_BHV, log_BHK, a_BHK, b_BHK in zip(*(t.unbind(1) for t in inputs.by_step()), strict=True):
        read_BHV = (a_BHK[..., None] * S_BHKV).sum(2)
        S_BHKV = log_BHK.exp()[..., None] * S_BHKV + b_BHK[..., None] * read_BHV[:, :, None]
        S_BHKV = S_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
        outputs.append((q_BHK[..., None] * S_BHKV).sum(2))
    return torch.stack(outputs, 1).to(inputs.v.dtype), S_BHKV
