"""Hyena in modal form, letter Y: gated long convolution whose filters are sums of exponentials, as in StripedHyena.

Shapes: B batch, L length, D d_model, I d_inner, K d_conv, N d_state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.kernels import diagonal_ssm as kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_TIMES = (1.0, 1000.0)  # range of the time constants of poles at initialisation [tokens]


@exportable
class HyenaState(NamedTuple):
    """The last K - 1 inputs of the short convolution, and the poles' states as real and imaginary parts, float32."""

    conv_BKX: Tensor  # (B, K - 1, 3 I)
    hidden_BIN2: Tensor


@register_block("Y", name="hyena")
class Hyena(Block):
    """``out_proj(x2 * (h * (x1 v) + D x1 v))`` with x2, x1, v = conv(in_proj(x)): arXiv 2302.10866, section 3.

    The long filter h of a channel is Re(sum over N of residue pole^t), the modal form of Laughing Hyena (arXiv
    2310.18780, section 3) that StripedHyena-7B has: a convolution by FFT over a sequence, and exactly equal to it a
    recurrence of constant state from token to token. Equal to the authors' ParallelHyenaFilter with its projections;
    Hyena's first filters, of a small network of the position, have no such state and are not here.
    """

    float32 = ("D", "poles", "residues")
    no_decay = ("poles",)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the Hyena block."""

        d_state: int = option(2, "complex poles of a channel's filter, N [count]", ge=1)
        d_inner: int | None = option(None, "channels of the filters; none: d_model [channels]", ge=1)
        d_conv: int = option(3, "taps of the short convolution [tokens]", ge=1)
        conv_bias: bool = option(True, "bias of the short convolution")
        bias: bool = option(True, "biases of the input and output projections")

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, n = self.d_model, self.width, self.d_state
            matrices = 4 * d * di
            biases = (3 * di + d if self.bias else 0) + (3 * di if self.conv_bias else 0)
            params = matrices + biases + 3 * di * self.d_conv + di + 4 * di * n  # the last: D, poles and residues
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            state = (self.d_conv - 1) * 3 * di * dtype_bytes + 8 * di * n
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            """Of the recurrence 11 per pole (pole h, + u, Re(residue h), +); of the convolution 2 per tap."""
            convolution = 2.0 * self.d_conv * 3 * self.width
            return {"diagonal_ssm": 11.0 * self.width * self.d_state, "causal_conv1d": convolution}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_inner": self.width}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, n = config.d_model, config.width, config.d_state
        self.in_proj = nn.Linear(d, 3 * di, bias=config.bias)
        self.conv1d = ShortConvolution(3 * di, config.d_conv, bias=config.conv_bias, activation=None, impl=impl)
        self.poles = nn.Parameter(torch.empty(di, n, 2))
        self.residues = nn.Parameter(torch.empty(di, n, 2))
        self.D = nn.Parameter(torch.empty(di))
        self.out_proj = nn.Linear(di, d, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_state": 5, "d_inner": 20, "d_conv": 1, "bias": False}),
            Variant(fields={"d_state": 1, "d_conv": 4, "conv_bias": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        before = None if state is None else cast(HyenaState, state)
        conv_BKX = None if before is None else before.conv_BKX
        z_BLX, conv_BKX = self.conv1d(self.in_proj(x_BLD), conv_BKX, segments_BL)
        outer_BLI, inner_BLI, value_BLI = z_BLX.chunk(3, dim=-1)
        u_BLI = inner_BLI * value_BLI
        wide = torch.promote_types(self.poles.dtype, torch.float32)
        poles_IN2, residues_IN2 = self.poles.to(wide), self.residues.to(wide)
        hidden = None if before is None else torch.complex(before.hidden_BIN2[..., 0], before.hidden_BIN2[..., 1])
        found = kernel.diagonal_ssm(
            u_BLI,
            torch.complex(poles_IN2[..., 0], poles_IN2[..., 1]).log(),
            torch.complex(residues_IN2[..., 0], residues_IN2[..., 1]),
            hidden,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=kernel.OPERATION.nearest(self.impl),
        )
        y_BLI, after = found if isinstance(found, tuple) else (found, None)
        y_BLD = self.out_proj(((y_BLI + self.D * u_BLI) * outer_BLI).to(x_BLD.dtype))
        if after is None or conv_BKX is None:
            return BlockOutput(y_BLD, None)
        return BlockOutput(y_BLD, HyenaState(conv_BKX, torch.view_as_real(after)))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return HyenaState(
            self.conv1d.init_state(batch_size, device=device, dtype=dtype),
            torch.zeros(batch_size, *self.poles.shape, device=device, dtype=torch.float32),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections with biases of zero, and filters that decay within 1 to 1,000 tokens.

        The authors' own initial values are not published: |pole| = exp(-1 / T), T log-uniform, its angle uniform in
        [0, pi), so that a filter is a damped oscillation; residues are normal, divided by T and the root of N.
        """
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv1d.reset_parameters()
        with torch.no_grad():
            low, high = (math.log(time) for time in _TIMES)
            rate_IN = torch.empty_like(self.poles[..., 0], dtype=torch.float32).uniform_(-high, -low).exp_()
            angle_IN = torch.empty_like(rate_IN).uniform_(0, math.pi)
            self.poles.copy_(torch.view_as_real(torch.polar((-rate_IN).exp(), angle_IN)))
            self.residues.normal_(std=self.config.d_state**-0.5).mul_(rate_IN[..., None].to(self.residues.dtype))
            self.D.normal_()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return those of poles and residues, which belong to a channel each."""
        return {"poles": matrix(1.0), "residues": matrix(1.0)}

    def implementations(self, device: torch.device) -> dict[str, str]:
        operations = (kernel.OPERATION, conv_kernel.OPERATION)
        return {op.name: op.describe(device, impl=op.nearest(self.impl)) for op in operations}
