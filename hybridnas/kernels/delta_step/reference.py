"""One token through a layer around a gated linear recurrence in plain torch: the specification, and the torch form.

Shapes: B batch, D d_model, C mixed channels (queries, keys, values), T taps, G key heads, H value heads, K key channels
and V value channels of a head, M state channels (V, and one more for a norm of the sum), I = H V, X decays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels.gated_delta.reference import Inputs, gated_delta_reference
from hybridnas.kernels.mamba_step.reference import Norm, normed

DECAYS = ("none", "fixed", "softplus", "bounded", "sigmoid", "forget")
MAPS = ("none", "elu", "relu", "l2")
NORMS = ("none", "head", "whole", "sum")
GATES = ("none", "silu", "sigmoid")


class Weights(NamedTuple):
    """The parameters of a block; linear ones (out, in). Those without a value are None.

    The rows of in_proj yield queries, keys and values (C; no keys where a forget gate is their complement), gate,
    decay, beta. conv (C, T); decay_proj (X, R) and decay_bias (X,): a second matrix of the decay; A_log (H,), or the
    logarithms of fixed decays; dt_bias (X,); frequency (K / 2,): angles by which positions turn queries and keys;
    gate_proj (I, R): a second matrix of the gate; norm (V,) or (I,); out_proj (D, I).
    """

    in_proj: Tensor
    conv: Tensor | None
    conv_bias: Tensor | None
    decay_proj: Tensor | None
    decay_bias: Tensor | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    frequency: Tensor | None
    gate_proj: Tensor | None
    norm: Tensor | None
    out_proj: Tensor


class Form(NamedTuple):
    """What a block computes of them.

    Decays: softplus is exp(-exp(A_log) softplus(x + dt_bias)), bounded exp(by sigmoid(exp(A_log) (x + dt_bias))),
    sigmoid sigmoid(x) ** (1 / by), forget f = by + (1 - by) sigmoid(x) with 1 - f as the key.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    columns: tuple[int, int, int, int]  # of in_proj: mixed, gate, decay, beta
    decay: str = "none"
    decay_by: float = 0.0
    beta: float = 0.0  # factor on sigmoid(b); 0: no delta term
    scale: float = 1.0  # of the queries
    feature_map: str = "none"
    l2_eps: float = 1e-6
    silu: int = 0  # channels of the mixed ones that SiLU follows where there is no convolution
    norm: str = "head"
    norm_eps: float = 1e-5
    sum_eps: float = 1e-6
    gate: str = "none"


def step_reference(
    x_BD: Tensor, conv_BTC: Tensor, memory_BHKM: Tensor, w: Weights, form: Form, norm: Norm | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output and its next states, in the dtype of the inputs."""
    heads, keys = form.value_heads, form.key_heads * form.key_dim
    row_BR = F.linear(normed(x_BD, norm), w.in_proj)
    u_BC, gate_BI, decay_BX, beta_BH = torch.split(row_BR, list(form.columns), dim=-1)
    if w.conv is not None:
        window_BTC = torch.cat([conv_BTC, u_BC[:, None]], dim=1)
        u_BC, conv_BTC = (window_BTC * w.conv.t()).sum(dim=1), window_BTC[:, 1:]
        u_BC = F.silu(u_BC if w.conv_bias is None else u_BC + w.conv_bias)
    else:
        u_BC = torch.cat([F.silu(u_BC[:, : form.silu]), u_BC[:, form.silu :]], dim=1)
    if w.gate_proj is not None:
        gate_BI = F.linear(gate_BI, w.gate_proj)
    if w.decay_proj is not None:
        decay_BX = F.linear(decay_BX, w.decay_proj, w.decay_bias)
    log, forget_BHK = _log_decay(decay_BX, w, form)
    q_BGK = _mapped(_heads(u_BC[:, :keys], form.key_heads), form)
    if forget_BHK is None:
        k_BGK = _mapped(_heads(u_BC[:, keys : 2 * keys], form.key_heads), form)
    else:
        k_BGK = 1 - forget_BHK
    v_BHM = _heads(u_BC[:, -heads * form.value_dim :], heads)
    if form.norm == "sum":
        v_BHM = F.pad(v_BHM, (0, 1), value=1.0)
    beta_BLH = form.beta * beta_BH.sigmoid()[:, None] if form.beta else None
    o_BLHM, memory_BHKM = gated_delta_reference(
        Inputs(q_BGK[:, None], k_BGK[:, None], v_BHM[:, None], log, beta_BLH, memory_BHKM, None, form.scale)
    )
    if w.frequency is not None:  # the next token's queries and keys count their positions from 0 again
        first, second = memory_BHKM.chunk(2, dim=2)
        cos, sin = w.frequency.cos()[:, None], w.frequency.sin()[:, None]
        memory_BHKM = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=2)
    y_BI = _finished(o_BLHM[:, 0], gate_BI, w, form)
    y_BD = F.linear(y_BI, w.out_proj)
    return (x_BD + y_BD if residual else y_BD), conv_BTC, memory_BHKM


def _heads(x_BX: Tensor, heads: int) -> Tensor:
    return torch.unflatten(x_BX, 1, (heads, -1))


def _log_decay(raw_BX: Tensor, w: Weights, form: Form) -> tuple[Tensor | None, Tensor | None]:
    """Return the logarithm as ``gated_delta`` takes it, and the forget gate (B, H, K) where that is what decays."""
    if form.decay == "none":
        return None, None
    if form.decay == "fixed":
        return w.A_log, None
    raw_BHX = _heads(raw_BX, form.value_heads)
    if form.decay in ("softplus", "bounded"):
        assert w.A_log is not None and w.dt_bias is not None
        rate_H1, biased_BHX = w.A_log.exp()[:, None], raw_BHX + w.dt_bias.view(form.value_heads, -1)
        log_BHX = -rate_H1 * F.softplus(biased_BHX)
        if form.decay == "bounded":
            log_BHX = form.decay_by * (rate_H1 * biased_BHX).sigmoid()
        return (log_BHX if w.dt_bias.shape != w.A_log.shape else log_BHX[..., 0])[:, None], None
    if form.decay == "sigmoid":
        return (F.logsigmoid(raw_BHX) / form.decay_by)[:, None], None
    forget_BHK = form.decay_by + (1 - form.decay_by) * raw_BHX.sigmoid()
    return forget_BHK.log()[:, None], forget_BHK


def _mapped(x_BGK: Tensor, form: Form) -> Tensor:
    if form.feature_map == "l2":
        return x_BGK * (x_BGK.square().sum(-1, keepdim=True) + form.l2_eps).rsqrt()
    if form.feature_map == "elu":
        positive: Tensor = F.elu(x_BGK) + 1
        return positive
    return F.relu(x_BGK) if form.feature_map == "relu" else x_BGK


def _finished(o_BHM: Tensor, gate_BI: Tensor, w: Weights, form: Form) -> Tensor:
    """Return the output norm's result times the gate, (B, I)."""
    if form.norm == "sum":
        o_BHM = o_BHM[..., :-1] / (o_BHM[..., -1:] + form.sum_eps)
    if form.norm == "whole":
        o_BHM = o_BHM.flatten(1)
    if w.norm is not None:
        o_BHM = o_BHM * (o_BHM.square().mean(-1, keepdim=True) + form.norm_eps).rsqrt() * w.norm
    y_BI = o_BHM if form.norm == "whole" else o_BHM.flatten(1)
    if form.gate == "none":
        return y_BI
    return y_BI * (F.silu(gate_BI) if form.gate == "silu" else gate_BI.sigmoid())
