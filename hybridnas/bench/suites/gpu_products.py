"""The gpu suite's cases that are matrix products: state-space duality, gated linear recurrences and routed experts.

With their peers. Shapes: B batch, L length, H heads, P channels of a head, G groups, N state size; K channels of a key,
V of a value; or N tokens, E experts, D width, F hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.bench import peers
from hybridnas.bench.result import Result
from hybridnas.kernels.gated_delta import gated_delta
from hybridnas.kernels.moe_dispatch import Experts, token_choice
from hybridnas.kernels.ssd import ssd

OURS, TORCH_SSD, MAMBA_SSM = "ours, Triton", "ours, torch chunked", "mamba-ssm"
TORCH_MOE, FLA, TORCH_GATED = "ours, torch grouped_mm", "flash-linear-attention", "ours, torch chunked"
_Call = Callable[..., Tensor]


def ssd_inputs(
    batch: int, length: int, heads: int, width: int, groups: int, size: int, *, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return x, dt, A, B, C, D, z, dt_bias; A, D and dt_bias stay float32."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    wide, narrow = (batch, length, heads, width), (batch, length, groups, size)
    given = [normal(wide), 0.1 * normal(batch, length, heads), -torch.linspace(1.0, 16.0, heads)]
    given += [normal(narrow), normal(narrow), torch.ones(heads), normal(wide), normal(heads) - 4.0]
    kept = (2, 5, 7)
    return [t.to(device, torch.float32 if i in kept else dtype).requires_grad_() for i, t in enumerate(given)]


def ssd_by(impl: str) -> _Call:
    """Return our form of the given implementation."""

    def call(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        y_BLHP = ssd(x, dt, A, B, C, D, z, dt_bias=bias, dt_softplus=True, impl=impl)
        assert isinstance(y_BLHP, Tensor)
        return y_BLHP

    return call


def ssd_forms(result: Result, case: str, impl: str, device: torch.device) -> dict[str, _Call]:
    """Return ours and the peers that are installed; ``result`` hears of those that are not."""
    forms: dict[str, _Call] = {OURS: ssd_by(impl), TORCH_SSD: ssd_by("torch")}
    for name, module, call in ((MAMBA_SSM, "mamba_ssm", _mamba_ssm), (FLA, "fla", _fla)):
        why = peers.absent(module) or ("" if device.type == "cuda" else f"{name} needs a CUDA device")
        if why:
            result.missing(case, name, why)
        else:
            forms[name] = call
    return forms


def _mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The authors' Triton kernels, in chunks of 256 as their block has them."""
    scan = peers.load("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    y_BLHP: Tensor = scan(x, dt, A, B, C, 256, D=D, z=z, dt_bias=bias, dt_softplus=True)
    return y_BLHP


def _fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """Gated linear attention with one decay a head is the same recurrence; the rest of it in torch."""
    attention = peers.load("fla.ops.simple_gla").chunk_simple_gla
    share, step_BLH = x.shape[2] // B.shape[2], F.softplus(dt.float() + bias)
    B_BLHN, C_BLHN = (t.repeat_interleave(share, dim=2) for t in (B, C))
    u_BLHP = (step_BLH[..., None] * x).to(x.dtype)
    y_BLHP, _ = attention(q=C_BLHN, k=B_BLHN, v=u_BLHP, g=step_BLH * A, scale=1.0)
    gated_BLHP: Tensor = (y_BLHP.float() + D[:, None] * x) * F.silu(z.float())
    return gated_BLHP.to(x.dtype)


def gated_inputs(
    batch: int,
    length: int,
    heads: int,
    size: int,
    width: int,
    *,
    variant: str,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return v, q, k, the log decay in float32, by head or by channel, and beta for a variant of the delta rule."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    narrow, head = (batch, length, heads, size), (batch, length, heads)
    by_channel = variant in ("Kimi delta attention", "GLA")
    log_decay = F.logsigmoid(normal(narrow if by_channel else head)) / 16
    given = [normal(batch, length, heads, width), *(F.normalize(normal(narrow), dim=-1) for _ in "qk"), log_decay]
    if variant != "GLA":
        given.append(normal(head).sigmoid())
    return [t.to(device, torch.float32 if i == 3 else dtype).requires_grad_() for i, t in enumerate(given)]


def gated_by(impl: str) -> _Call:
    """Return our function's form of the given implementation."""

    def call(v: Tensor, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor | None = None) -> Tensor:
        o_BLHV = gated_delta(q, k, v, log_decay, beta, impl=impl)
        assert isinstance(o_BLHV, Tensor)
        return o_BLHV

    return call


def gated_forms(result: Result, case: str, impl: str, device: torch.device) -> dict[str, _Call]:
    """Return ours, and flash-linear-attention behind the same function; it refuses float32."""
    forms: dict[str, _Call] = {OURS: gated_by(impl), TORCH_GATED: gated_by("torch")}
    why = peers.absent("fla") or ("" if device.type == "cuda" else f"{FLA} needs a CUDA device")
    if why:
        result.missing(case, FLA, why)
    else:
        forms[FLA] = gated_by("fla")
    return forms


def moe_inputs(
    tokens: int, n_experts: int, width: int, hidden: int, *, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Return x (N, D), gates (N, 1) and the experts' matrices (E, D, F) and (E, F, D)."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    given = [normal(tokens, width), normal(tokens, 1).sigmoid(), normal(n_experts, width, hidden) / width**0.5]
    given += [normal(n_experts, hidden, width) / hidden**0.5]
    return [t.to(device, dtype).requires_grad_() for t in given]


@cache
def _chosen(tokens: int, n_experts: int, device: torch.device) -> Tensor:
    drawn = torch.randint(0, n_experts, (tokens, 1), generator=torch.Generator().manual_seed(1))
    return drawn.to(device)


def moe_by(impl: str) -> _Call:
    """Return our form of the given implementation: each token goes to one expert, drawn at random."""

    def call(x_ND: Tensor, gate_NK: Tensor, up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
        expert_NK = _chosen(x_ND.shape[0], up_EDF.shape[0], x_ND.device)
        return token_choice(x_ND, gate_NK, expert_NK, Experts(up_EDF, down_EFD, activation="silu"), impl=impl)[0]

    return call


def moe_forms(result: Result, case: str, impl: str, device: torch.device) -> dict[str, _Call]:
    """Return ours, in Triton and in torch's own matrix products."""
    return {OURS: moe_by(impl), TORCH_MOE: moe_by("torch")}
