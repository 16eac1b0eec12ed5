"""Gated short convolution, letter C: LFM2's mixer, a causal convolution of a few taps between two gates.

Shapes: B batch, L length, D d_model, I d_inner, K d_conv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.mode import is_plain_eager
from hybridnas.layers.norms import one_row
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.registry import register_block


@exportable
class GatedConvState(NamedTuple):
    """The last K - 1 inputs of the convolution: what the first gate let through."""

    conv_BKI: Tensor


@register_block("C", name="gated_conv")
class GatedConv(Block):
    """``out_proj(c * conv(b * u))`` with ``b, c, u = in_proj(x)``: LFM2's mixer (Liquid AI 2025, arXiv 2511.23404).

    No activation anywhere; the convolution sees K tokens and nothing else remembers. Parameter names and layouts are
    those of transformers' Lfm2ShortConv.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the gated short convolution."""

        d_conv: int = option(3, "taps of the causal convolution [tokens]", ge=1)
        d_inner: int | None = option(None, "width between the projections; none: d_model [channels]", ge=1)
        conv_bias: bool = option(False, "bias of the convolution")
        bias: bool = option(False, "biases of the input and output projections")

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, conv = self.d_model, self.width, self.d_conv * self.width
            matrices = d * 3 * di + di * d
            params = matrices + conv + (3 * di + d if self.bias else 0) + (di if self.conv_bias else 0)
            state = (self.d_conv - 1) * di * dtype_bytes
            flops = 2.0 * (matrices + conv)
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            return {"causal_conv1d": 2 * self.d_conv * self.width}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_inner": self.width}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di = config.d_model, config.width
        self.in_proj = nn.Linear(d, 3 * di, bias=config.bias)
        self.conv = ShortConvolution(di, config.d_conv, bias=config.conv_bias, activation=None, impl=impl)
        self.out_proj = nn.Linear(di, d, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_conv": 7, "bias": True, "conv_bias": True}),
            Variant(fields={"d_conv": 1, "d_inner": 20}),
            Variant(fields={"d_conv": 4, "d_inner": 7, "conv_bias": True}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        b_BLI, c_BLI, u_BLI = self.in_proj(x_BLD).chunk(3, dim=-1)
        before = None if state is None else cast(GatedConvState, state).conv_BKI
        y_BLI, after = self.conv(b_BLI * u_BLI, before, segments_BL)
        y_BLD = self.out_proj(c_BLI * y_BLI)
        return BlockOutput(y_BLD, None if after is None else GatedConvState(after))

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not GatedConv.forward or not is_plain_eager(state[0].device):
            return None
        normed, convolve, in_proj, out_proj = one_row(norm), self.conv.one_token(state[0]), self.in_proj, self.out_proj
        if convolve is None:
            return None

        def run(x_BD: Tensor) -> Tensor:
            b_BI, c_BI, u_BI = in_proj(normed(x_BD)).chunk(3, dim=-1)
            y_BD: Tensor = out_proj(c_BI * convolve(b_BI * u_BI))
            return x_BD + y_BD

        return run

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return GatedConvState(self.conv.init_state(batch_size, device=device, dtype=dtype))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections and torch's own depthwise convolution; biases of projections are zero."""
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv.reset_parameters()

    def implementations(self, device: torch.device) -> dict[str, str]:
        operation = conv_kernel.OPERATION
        return {operation.name: operation.describe(device, impl=operation.nearest(self.impl))}
