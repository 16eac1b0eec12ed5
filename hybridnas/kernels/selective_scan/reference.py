"""The selective scan as in the Mamba paper (arXiv 2312.00752, algorithm 2), step by step: the specification.

Shapes: B batch, L length, D channels, N state size.

    delta = softplus(delta + delta_bias)             if delta_softplus
    h_t   = exp(delta_t A) h_{t-1} + delta_t B_t u_t  (zero-order hold for A, Euler for B, as the authors' code does)
    y_t   = (C_t h_t + D u_t) * silu(z_t)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, empty_result, state_dtype


class Inputs(NamedTuple):
    """The arguments of a scan, in the order of ``selective_scan``."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)
    D: Tensor | None = None  # (D,)
    z: Tensor | None = None  # (B, L, D)
    delta_bias: Tensor | None = None  # (D,)
    initial_state: Tensor | None = None  # (B, D, N)
    seq_idx: Tensor | None = None  # (B, L) integers
    delta_softplus: bool = False

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The nine inputs that have a gradient."""
        return self[:9]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums."""
        return state_dtype(self.u, self.delta, self.A, self.B, self.C)


def scan_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the final state (B, D, N), one step at a time, differentiable by plain autograd."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus = inputs
    dtype = inputs.dtype
    batch, length, channels = u.shape
    dt_BLD = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    if delta_softplus:
        dt_BLD = F.softplus(dt_BLD)
    A_DN, u_BLD = A.to(dtype), u.to(dtype)
    h_BDN = u_BLD.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    starts = None if seq_idx is None else boundaries(seq_idx).unbind(1)
    outputs = []
    # unbind, not x[:, t]: the backward of indexing fills a full-size zero tensor at every step, quadratic in L
    steps = (dt_BLD.unbind(1), u_BLD.unbind(1), B.to(dtype).unbind(1), C.to(dtype).unbind(1))
    for t, (dt_BD, u_BD, B_BN, C_BN) in enumerate(zip(*steps, strict=True)):
        if starts is not None:
            h_BDN = torch.where(starts[t][:, None, None], torch.zeros_like(h_BDN), h_BDN)
        h_BDN = torch.exp(dt_BD[..., None] * A_DN) * h_BDN + (dt_BD * u_BD)[..., None] * B_BN[:, None, :]
        outputs.append((h_BDN * C_BN[:, None, :]).sum(-1))
    y_BLD = torch.stack(outputs, 1) if length else empty_result(u.shape, u_BLD, delta, delta_bias, A, B, C)
    if D is not None:
        y_BLD = y_BLD + u_BLD * D.to(dtype)
    if z is not None:
        y_BLD = y_BLD * F.silu(z.to(dtype))
    return y_BLD.to(u.dtype), h_BDN
