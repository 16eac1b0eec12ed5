"""One token through a Mamba layer in plain torch: the specification, and the torch form, since nothing loops over time.

Shapes: B batch, D d_model, I d_inner, N d_state, K d_conv, R dt_rank, P what x_proj yields.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Norm(NamedTuple):
    """The norm in front of the layer: rmsnorm or layernorm, its weight and bias (D,) or None, its epsilon."""

    kind: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Weights(NamedTuple):
    """The parameters of a Mamba block; linear ones (out, in). Those without a value are None.

    in_proj (2I, D); conv (I, K); x_proj (P, I), P the parts of R step, N B, N C that depend on the input; dt_proj
    (I, R) or None; dt_bias, D (I,); A_log (I, N); B, C (N,) where constant; out_proj (D, I).
    """

    in_proj: Tensor
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor | None
    dt_proj: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    B: Tensor | None
    C: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None


def step_reference(
    x_BD: Tensor, conv_BKI: Tensor, ssm_BIN: Tensor, w: Weights, norm: Norm | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output and its next states, in the dtype of the inputs."""
    u_BI, z_BI = F.linear(normed(x_BD, norm), w.in_proj, w.in_bias).chunk(2, dim=-1)
    window_BKI = torch.cat([conv_BKI, u_BI[:, None]], dim=1)
    u_BI = (window_BKI * w.conv.t()).sum(dim=1)
    u_BI = F.silu(u_BI if w.conv_bias is None else u_BI + w.conv_bias)
    delta_BI, B_BN, C_BN = _selected(u_BI, w)
    delta_BI = F.softplus(delta_BI + w.dt_bias)
    decay_BIN = torch.exp(-delta_BI[..., None] * w.A_log.exp())
    next_BIN = decay_BIN * ssm_BIN + (delta_BI * u_BI)[..., None] * B_BN[:, None]
    y_BI = (next_BIN * C_BN[:, None]).sum(dim=-1) + w.D * u_BI
    y_BD = F.linear(y_BI * F.silu(z_BI), w.out_proj, w.out_bias)
    return (x_BD + y_BD if residual else y_BD), window_BKI[:, 1:], next_BIN


def normed(x_BD: Tensor, norm: Norm | None) -> Tensor:
    """Return the norm in front of the layer, or x where there is none."""
    if norm is None:
        return x_BD
    size = (x_BD.shape[-1],)
    if norm.kind == "rmsnorm":
        return F.rms_norm(x_BD, size, norm.weight, norm.eps)
    return F.layer_norm(x_BD, size, norm.weight, norm.bias, norm.eps)


def _selected(u_BI: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return the step before bias and softplus, B and C."""
    rank = 0 if w.dt_proj is None else w.dt_proj.shape[1]
    size = w.A_log.shape[1]
    widths = [rank, 0 if w.B is not None else size, 0 if w.C is not None else size]
    proj_BP = u_BI.new_zeros(u_BI.shape[0], 0) if w.x_proj is None else F.linear(u_BI, w.x_proj)
    dt_BR, B_BN, C_BN = torch.split(proj_BP, widths, dim=-1)
    delta_BI = u_BI.new_zeros(()) if w.dt_proj is None else F.linear(dt_BR, w.dt_proj)
    batch = u_BI.shape[0]
    return (
        delta_BI,
        B_BN if w.B is None else w.B.expand(batch, -1),
        C_BN if w.C is None else w.C.expand(batch, -1),
    )
