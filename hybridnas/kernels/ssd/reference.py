"""State-space duality as a recurrence (Dao and Gu 2024, arXiv 2405.21060, section 3): the specification.

Shapes: B batch, L length, H heads, P channels of a head, G groups of heads that share B and C, N state size.

    dt  = softplus(dt + dt_bias)                       if dt_softplus
    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T        one number A per head, h (P, N)
    y_t = (h_t C_t + D x_t) * silu(z_t)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, empty_result, state_dtype


def steps_of(dt_BLH: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    """Return the step sizes in ``dtype``."""
    raw_BLH = dt_BLH.to(dtype) if dt_bias is None else dt_BLH.to(dtype) + dt_bias.to(dtype)
    return F.softplus(raw_BLH) if dt_softplus else raw_BLH


def finish(y_BLHP: Tensor, x_BLHP: Tensor, D_H: Tensor | None, z_BLHP: Tensor | None) -> Tensor:
    """Return y with the skip and the gate, in x's dtype."""
    if D_H is not None:
        y_BLHP = y_BLHP + D_H.to(y_BLHP.dtype)[:, None] * x_BLHP.to(y_BLHP.dtype)
    if z_BLHP is not None:
        y_BLHP = y_BLHP * F.silu(z_BLHP.to(y_BLHP.dtype))
    return y_BLHP.to(x_BLHP.dtype)


class Inputs(NamedTuple):
    """The arguments of state-space duality, in the order of ``ssd``."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H,)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None = None  # (H,)
    z: Tensor | None = None  # (B, L, H, P)
    dt_bias: Tensor | None = None  # (H,)
    initial_state: Tensor | None = None  # (B, H, P, N)
    seq_idx: Tensor | None = None  # (B, L) integers
    dt_softplus: bool = False
    chunk_size: int = 64  # steps of a chunk, where the form has chunks

    @property
    def floating(self) -> tuple[Tensor | None, ...]:
        """The nine inputs that have a gradient."""
        return self[:9]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums."""
        return state_dtype(self.x, self.dt, self.A, self.B, self.C)


def ssd_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) and the final state (B, H, P, N), one step at a time."""
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, _ = inputs
    dtype, (batch, length, heads, width) = inputs.dtype, x.shape
    share = heads // B.shape[2]
    dt_BLH = steps_of(dt, dt_bias, dt_softplus, dtype)
    decay_BLH = torch.exp(dt_BLH * A.to(dtype))
    if seq_idx is not None:
        decay_BLH = decay_BLH.masked_fill(boundaries(seq_idx)[..., None], 0.0)
    if initial_state is None:
        h_BHPN = torch.zeros(batch, heads, width, B.shape[3], dtype=dtype, device=x.device)
    else:
        h_BHPN = initial_state.to(dtype)
    x_BLHP, B_BLHN, C_BLHN = x.to(dtype), *(t.to(dtype).repeat_interleave(share, dim=2) for t in (B, C))
    outputs = []
    steps = (decay_BLH.unbind(1), dt_BLH.unbind(1), x_BLHP.unbind(1), B_BLHN.unbind(1), C_BLHN.unbind(1))
    for a_BH, dt_BH, x_BHP, B_BHN, C_BHN in zip(*steps, strict=True):
        h_BHPN = a_BH[..., None, None] * h_BHPN + (dt_BH[..., None] * x_BHP)[..., None] * B_BHN[:, :, None]
        outputs.append((h_BHPN * C_BHN[:, :, None]).sum(-1))
    y_BLHP = torch.stack(outputs, 1) if length else empty_result(x.shape, x_BLHP, dt, dt_bias, A, B, C)
    return finish(y_BLHP, x, D, z), h_BHPN
