"""Gated linear recurrences step by step: the specification.

Shapes: B batch, L length, G groups of heads that share queries and keys, H value heads, K channels of a key, V channels
of a value.

    S_t = diag(exp(g_t)) S_{t-1}                    the decay, S (K, V); g is none, one number, or one by channel
    e_t = beta_t (v_t - S_t^T k_t)                  with the delta rule, else e_t = v_t
    S_t = S_t + k_t e_t^T
    o_t = S_t^T (scale q_t)

Sources: Gated DeltaNet (arXiv 2412.06464, section 3.1), Kimi delta attention (arXiv 2510.26692, section 3), gated
linear attention (arXiv 2312.06635, section 4).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, empty_result, state_dtype


class Inputs(NamedTuple):
    """The arguments of the recurrence, in the order of ``gated_delta``."""

    q: Tensor  # (B, L, G, K)
    k: Tensor  # (B, L, G, K)
    v: Tensor  # (B, L, H, V)
    log_decay: Tensor | None = None  # (H,), (B, L, H) or (B, L, H, K)
    beta: Tensor | None = None  # (B, L, H)
    initial_state: Tensor | None = None  # (B, H, K, V)
    seq_idx: Tensor | None = None  # (B, L) integers
    scale: float | None = None  # of the queries; None is K ** -0.5
    chunk_size: int = 64  # steps of a chunk, where the form has chunks

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The six inputs that have a gradient."""
        return self[:6]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums."""
        return state_dtype(self.q, self.k, self.v, self.log_decay, self.beta)

    @property
    def query_scale(self) -> float:
        """What the queries are multiplied by."""
        return self.q.shape[3] ** -0.5 if self.scale is None else self.scale

    def by_head(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return q times its scale and k, both (B, L, H, K), and v (B, L, H, V), in ``dtype``."""
        share = self.v.shape[2] // self.q.shape[2]
        q_BLHK, k_BLHK = (t.to(self.dtype).repeat_interleave(share, dim=2) for t in (self.q, self.k))
        return q_BLHK * self.query_scale, k_BLHK, self.v.to(self.dtype)

    def log_decay_by_step(self) -> Tensor | None:
        """Return the log decay (B, L, H) or (B, L, H, K) in ``dtype``, -inf where a document begins, or None."""
        batch, length, heads = self.v.shape[:3]
        if self.log_decay is None:
            if self.seq_idx is None:
                return None
            log = self.v.new_zeros(batch, length, heads, dtype=self.dtype)
        else:
            log = self.log_decay.to(self.dtype)
            log = log.expand(batch, length, heads) if log.dim() == 1 else log
        if self.seq_idx is None:
            return log
        begins_BL = boundaries(self.seq_idx)
        return log.masked_fill(begins_BL.reshape(*begins_BL.shape, *[1] * (log.dim() - 2)), float("-inf"))

    def start(self) -> Tensor:
        """Return the state before the first step (B, H, K, V) in ``dtype``."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        shape = (self.v.shape[0], self.v.shape[2], self.k.shape[3], self.v.shape[3])
        return self.v.new_zeros(shape, dtype=self.dtype)


def gated_delta_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V), one step at a time."""
    q_BLHK, k_BLHK, v_BLHV = inputs.by_head()
    batch, length, heads, width = v_BLHV.shape
    log, S_BHKV = inputs.log_decay_by_step(), inputs.start()
    if length == 0:
        return empty_result((batch, 0, heads, width), inputs.v, *inputs.floating), S_BHKV
    decays, betas = _nothing(length), _nothing(length)
    if log is not None:
        decays = list((log if log.dim() == 4 else log[..., None]).exp().unbind(1))  # (B, H, K) or (B, H, 1)
    if inputs.beta is not None:
        betas = list(inputs.beta.to(inputs.dtype).unbind(1))
    outputs = []
    steps = zip(q_BLHK.unbind(1), k_BLHK.unbind(1), v_BLHV.unbind(1), decays, betas, strict=True)
    for q_BHK, k_BHK, e_BHV, decay, beta_BH in steps:
        if decay is not None:
            S_BHKV = decay[..., None] * S_BHKV
        if beta_BH is not None:
            e_BHV = beta_BH[..., None] * (e_BHV - (k_BHK[..., None] * S_BHKV).sum(2))
        S_BHKV = S_BHKV + k_BHK[..., None] * e_BHV[:, :, None]
        outputs.append((q_BHK[..., None] * S_BHKV).sum(2))
    return torch.stack(outputs, 1).to(inputs.v.dtype), S_BHKV


def _nothing(length: int) -> list[Tensor | None]:
    return [None] * length
