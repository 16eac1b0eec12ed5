"""Mamba-2 block, letter N: state-space duality with one decay per head (Dao and Gu 2024, arXiv 2405.21060).

Shapes: B batch, L length, D d_model, I d_inner, H heads, P head_dim, G n_groups, N d_state, K d_conv, J conv channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.kernels import ssd as ssd_kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable
from hybridnas.layers.mode import is_plain_eager
from hybridnas.layers.norms import GatedRMSNorm, one_row, silu_gated
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.registry import register_block

_DT_MIN, _DT_MAX, _DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the step sizes at initialisation
_A_MIN, _A_MAX = 1.0, 16.0  # range of -A at initialisation
_LARGEST_HEAD = 64  # the authors' head_dim


def ssd_flops(heads: int, head_dim: int, d_state: int, *, normed: bool = True) -> int:
    """Return FLOPs of the recurrence, gate and norm for one token.

    Per channel and state 5 (decay h, (dt x) B, +, C h, +); per channel 5 (dt x, D x, +, silu z, gate), and 4 of the
    norm where there is one; per head 4 (+ bias, softplus, dt A, exp).
    """
    return heads * head_dim * (5 * d_state + (9 if normed else 5)) + 4 * heads


@exportable
class Mamba2State(NamedTuple):
    """The last K - 1 inputs of the convolution, and the state of the recurrence, always float32."""

    conv_BKJ: Tensor
    ssm_BHPN: Tensor


@register_block("N", name="mamba2")
class Mamba2(Block):
    """State-space duality with a gated RMSNorm, as the authors' code computes it, or as Falcon-H1 with the gate alone.

    Parameter names and layouts are those of ``mamba_ssm`` and of transformers' Mamba2Mixer.
    """

    float32 = ("A_log", "D", "dt_bias")
    no_decay = ("A_log", "D", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the Mamba-2 block."""

        d_state: int = option(128, "state size N per channel [count]", ge=1)
        d_conv: int = option(4, "taps of the causal convolution [tokens]", ge=1)
        expand: float = option(2.0, "d_inner as a multiple of d_model, where d_inner is none", gt=0)
        d_inner: int | None = option(None, "inner width; none: round(expand * d_model) [channels]", ge=1)
        head_dim: int | None = option(
            None, "channels of one head; none: the largest divisor of d_inner up to 64 [channels]", ge=1
        )
        n_groups: int = option(1, "groups of heads that share B and C [count]", ge=1)
        conv_bias: bool = option(True, "bias of the convolution")
        bias: bool = option(False, "biases of the input and output projections")
        norm_eps: float = option(1e-5, "epsilon of the gated norm", gt=0)
        gated_norm: bool = option(True, "RMSNorm of y * silu(z), each group by itself; false: y * silu(z) (Falcon-H1)")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width < 1:
                raise ConfigError(
                    f"{self.label()} expand={self.expand} of d_model={self.d_model} leaves no inner channel; "
                    f"use a larger expand, or give d_inner",
                    field="expand",
                    got=self.expand,
                    allowed=f">= {1 / self.d_model:.4g}",
                )
            if self.width % self.head_width:
                near = _largest_divisor(self.width, self.head_width)
                raise ConfigError(
                    f"{self.label()} head_dim={self.head_dim} does not divide d_inner={self.width}; "
                    f"use head_dim={near}",
                    field="head_dim",
                    got=self.head_dim,
                    allowed=f"a divisor of {self.width}, such as {near}",
                )
            if self.heads % self.n_groups:
                near = _largest_divisor(self.heads, self.n_groups)
                raise ConfigError(
                    f"{self.label()} n_groups={self.n_groups} does not divide the {self.heads} heads of "
                    f"d_inner={self.width}; use n_groups={near}",
                    field="n_groups",
                    got=self.n_groups,
                    allowed=f"a divisor of {self.heads}, such as {near}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else round(self.expand * self.d_model)

        @property
        def head_width(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else _largest_divisor(self.width, _LARGEST_HEAD)

        @property
        def heads(self) -> int:
            """Return the number of heads."""
            return self.width // self.head_width

        @property
        def conv_width(self) -> int:
            """Return the channels that pass the convolution: x, B and C."""
            return self.width + 2 * self.n_groups * self.d_state

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, wide = self.d_model, self.width, self.conv_width
            matrices = d * (di + wide + self.heads) + di * d
            biases = di + wide + self.heads + d if self.bias else 0
            conv = wide * self.d_conv + (wide if self.conv_bias else 0)
            params = matrices + biases + conv + 3 * self.heads  # dt bias, A, D
            params += di if self.gated_norm else 0
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            state = (self.d_conv - 1) * wide * dtype_bytes + di * self.d_state * 4
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            recurrence = ssd_flops(self.heads, self.head_width, self.d_state, normed=self.gated_norm)
            return {"ssd": recurrence, "causal_conv1d": 2 * self.d_conv * self.conv_width}

        def canonical(self) -> dict[str, Any]:
            fields = {**self.to_dict(), "d_inner": self.width, "head_dim": self.head_width}
            idle = {"expand"} if self.gated_norm else {"expand", "norm_eps"}
            return {name: value for name, value in fields.items() if name not in idle}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, wide, heads = config.d_model, config.width, config.conv_width, config.heads
        self.in_proj = nn.Linear(d, di + wide + heads, bias=config.bias)
        self.conv1d = ShortConvolution(wide, config.d_conv, bias=config.conv_bias, impl=impl)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(di, di // config.n_groups, config.norm_eps) if config.gated_norm else None
        self.out_proj = nn.Linear(di, d, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_state": 5, "n_groups": 2, "head_dim": 4, "bias": True}),
            Variant(fields={"d_inner": 24, "head_dim": 8, "n_groups": 3, "d_conv": 1, "conv_bias": False}),
            Variant(fields={"expand": 1.5, "d_state": 16, "head_dim": 1, "d_conv": 2}),
            Variant(fields={"d_state": 8, "head_dim": 4, "n_groups": 2, "gated_norm": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        config: Mamba2.Config = self.config
        before = None if state is None else cast(Mamba2State, state)
        sizes = [config.width, config.conv_width, config.heads]
        z_BLI, u_BLJ, dt_BLH = torch.split(self.in_proj(x_BLD), sizes, dim=-1)
        u_BLJ, conv_BKJ = self.conv1d(u_BLJ, None if before is None else before.conv_BKJ, segments_BL)
        y_BLI, ssm_BHPN = self._scan(u_BLJ, dt_BLH, before, segments_BL)
        y_BLD = self.out_proj(silu_gated(y_BLI, z_BLI) if self.norm is None else self.norm(y_BLI, z_BLI))
        after = None if conv_BKJ is None or ssm_BHPN is None else Mamba2State(conv_BKJ, ssm_BHPN)
        return BlockOutput(y_BLD, after)

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        conv_BKJ, ssm_BHPN = cast(Mamba2State, state)
        plain = self.in_proj.weight.dtype == conv_BKJ.dtype == torch.float32 and is_plain_eager(conv_BKJ.device)
        convolve = self.conv1d.one_token(conv_BKJ)
        if type(self).forward is not Mamba2.forward or not plain or convolve is None:
            return None
        config: Mamba2.Config = self.config
        batch, groups, size = ssm_BHPN.shape[0], config.n_groups, config.d_state
        normed, gated = one_row(norm), silu_gated if self.norm is None else self.norm
        sizes = [config.width, config.conv_width, config.heads]
        # X: every group of every sequence, I: its channels; overwritten, so every sequence needs memory of its own
        h_XIN = ssm_BHPN.contiguous().view(batch * groups, config.width // groups, size)
        A_H = -self.A_log.exp()

        def run(x_BD: Tensor) -> Tensor:
            z_BI, u_BJ, dt_BH = torch.split(self.in_proj(normed(x_BD)), sizes, dim=-1)
            u_BI, B_BX, C_BX = torch.split(convolve(u_BJ), [config.width, groups * size, groups * size], dim=-1)
            dt_BH = F.softplus(dt_BH + self.dt_bias)
            keep_BH = torch.exp(dt_BH * A_H)
            u_BHP = u_BI.reshape(batch, config.heads, config.head_width)
            h_XIN.view(batch, config.heads, config.head_width * size).mul_(keep_BH[..., None])
            h_XIN.addcmul_((u_BHP * dt_BH[..., None]).reshape(*h_XIN.shape[:2], 1), B_BX.reshape(-1, 1, size))
            if h_XIN.shape[0] == 1:
                y_BHP = torch.mv(h_XIN[0], C_BX[0]).view(u_BHP.shape)
            else:  # torch's batched product of matrices and vectors is five times slower
                y_BHP = (h_XIN * C_BX.reshape(-1, 1, size)).sum(-1).view(u_BHP.shape)
            y_BI = torch.addcmul(y_BHP, u_BHP, self.D[:, None]).flatten(1)
            y_BD: Tensor = self.out_proj(gated(y_BI, z_BI))
            return x_BD + y_BD

        return run

    def _scan(
        self, u_BLJ: Tensor, dt_BLH: Tensor, before: Mamba2State | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        config: Mamba2.Config = self.config
        shared = config.n_groups * config.d_state
        x_BLI, B_BLX, C_BLX = torch.split(u_BLJ, [config.width, shared, shared], dim=-1)
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        scanned = ssd_kernel.ssd(
            x_BLI.reshape(*x_BLI.shape[:2], config.heads, config.head_width),
            dt_BLH,
            -self.A_log.to(wide).exp(),
            B_BLX.reshape(*x_BLI.shape[:2], config.n_groups, config.d_state),
            C_BLX.reshape(*x_BLI.shape[:2], config.n_groups, config.d_state),
            self.D.to(wide),
            dt_bias=self.dt_bias.to(wide),
            dt_softplus=True,
            initial_state=None if before is None else before.ssm_BHPN,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=ssd_kernel.OPERATION.nearest(self.impl),
        )
        y_BLHP, ssm_BHPN = scanned if isinstance(scanned, tuple) else (scanned, None)
        return y_BLHP.flatten(-2), ssm_BHPN

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        config: Mamba2.Config = self.config
        heads = (batch_size, config.heads, config.head_width, config.d_state)
        return Mamba2State(
            self.conv1d.init_state(batch_size, device=device, dtype=dtype),
            torch.zeros(heads, device=device, dtype=torch.float32),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw the authors' initialisation: plain PyTorch linears, -A uniform in [1, 16]; init_scale is not used."""
        for module in (self.in_proj, self.conv1d, self.out_proj):
            module.reset_parameters()
        with torch.no_grad():
            self.A_log.uniform_(_A_MIN, _A_MAX).log_()
            self.D.fill_(1.0)
            if self.norm is not None:
                self.norm.weight.fill_(1.0)
            low, high = math.log(_DT_MIN), math.log(_DT_MAX)
            dt_H = torch.rand_like(self.dt_bias, dtype=torch.float32).mul_(high - low).add_(low).exp_()
            dt_H.clamp_(_DT_FLOOR)
            self.dt_bias.copy_(dt_H + torch.log(-torch.expm1(-dt_H)))  # the inverse of softplus

    def implementations(self, device: torch.device) -> dict[str, str]:
        operations = (ssd_kernel.OPERATION, conv_kernel.OPERATION)
        return {op.name: op.describe(device, impl=op.nearest(self.impl)) for op in operations}


def _largest_divisor(number: int, limit: int) -> int:
    return next(k for k in range(min(number, limit), 0, -1) if number % k == 0)
