"""Real-gated linear recurrent unit, letter R: the recurrent block of Griffin and RecurrentGemma (De et al. 2024).

Shapes: B batch, L length, D d_model, I d_inner, K d_conv, H blocks of a gate's matrix, P = I / H channels of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from hybridnas.kernels import diagonal_scan as scan_kernel
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.linear_recurrence import largest_divisor
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_HEAD = 64  # channels of a block of the gates by default; the released models have 256
_SHARPNESS = 8.0  # c of the paper's equation 3
_MAX_SLOPE = 1000.0  # of the square root, as the authors clip it
_RADIUS = (0.9, 0.999)  # range of the decays at initialisation, before the gate


@exportable
class RgLruState(NamedTuple):
    """The last K - 1 inputs of the convolution, the recurrence's state, float32, and whether a token was read."""

    conv_BKI: Tensor
    hidden_BI: Tensor
    begun_B1: Tensor


@register_block("R", name="rg_lru")
class RgLru(Block):
    """``linear_out(act(linear_y(x)) * rg_lru(conv_1d(linear_x(x))))``: arXiv 2402.19427, section 2.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t) with a_t = exp(-8 r_t softplus(recurrent_param)); the gates r and i
    are sigmoids of block-diagonal products with u (section 2.4). As in the authors' code the first input of a sequence
    is not scaled by the root, and the root's slope is at most 1,000. Parameter names and layouts are those of
    transformers' RecurrentGemmaRecurrentBlock.
    """

    outputs = ("linear_out",)
    float32 = ("rg_lru.recurrent_param",)
    no_decay = ("rg_lru.input_gate_bias", "rg_lru.recurrent_gate_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the RG-LRU block."""

        d_inner: int | None = option(None, "width of the recurrence; none: d_model [channels]", ge=1)
        gate_blocks: int | None = option(None, "blocks of the gates' matrices; none: of 64 channels [count]", ge=1)
        d_conv: int = option(4, "taps of the causal convolution [tokens]", ge=1)
        conv_bias: bool = option(True, "bias of the convolution")
        bias: bool = option(True, "biases of the three projections")
        activation: str = option("gelu_tanh", "nonlinearity of the side branch", choices=tuple(ACTIVATIONS))

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % self.blocks:
                near = largest_divisor(self.width, self.blocks)
                raise ConfigError(
                    f"{self.label()} gate_blocks={self.blocks} does not divide the inner width {self.width}; "
                    f"use gate_blocks={near}",
                    field="gate_blocks",
                    got=self.blocks,
                    allowed=f"a divisor of {self.width}, such as {near}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        @property
        def blocks(self) -> int:
            """Return gate_blocks with its default resolved."""
            return (
                self.gate_blocks
                if self.gate_blocks is not None
                else largest_divisor(self.width, max(1, self.width // _HEAD))
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, kernels = self.d_model, self.width, self.kernel_flops()
            matrices = 3 * d * di + 2 * di * di // self.blocks
            biases = (2 * di + d if self.bias else 0) + 2 * di + (di if self.conv_bias else 0)
            params = matrices + biases + self.d_conv * di + di  # the last: the decays
            state = (self.d_conv - 1) * di * dtype_bytes + 4 * di + 1
            flops = 2.0 * matrices + sum(kernels.values())
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            """Per channel 9: log decay, exp, 1 - a^2, root, two gatings, and a h + x of the scan."""
            return {"diagonal_scan": 9.0 * self.width, "causal_conv1d": 2.0 * self.d_conv * self.width}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_inner": self.width, "gate_blocks": self.blocks}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di = config.d_model, config.width
        self.linear_y = nn.Linear(d, di, bias=config.bias)
        self.linear_x = nn.Linear(d, di, bias=config.bias)
        self.linear_out = nn.Linear(di, d, bias=config.bias)
        self.conv_1d = ShortConvolution(di, config.d_conv, bias=config.conv_bias, activation=None, impl=impl)
        self.rg_lru = _Recurrence(di, config.blocks, impl)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"gate_blocks": 4, "bias": False, "conv_bias": False, "activation": "silu"}),
            Variant(fields={"d_inner": 24, "gate_blocks": 3, "d_conv": 1}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        before = None if state is None else cast(RgLruState, state)
        y_BLI = ACTIVATIONS[self.config.activation](self.linear_y(x_BLD))
        u_BLI, conv_BKI = self.conv_1d(self.linear_x(x_BLD), None if before is None else before.conv_BKI, segments_BL)
        h_BLI, hidden_BI = self.rg_lru(u_BLI, before, segments_BL)
        y_BLD = self.linear_out(h_BLI * y_BLI)
        if before is None or conv_BKI is None or hidden_BI is None:
            return BlockOutput(y_BLD, None)
        begun_B1 = before.begun_B1 if not x_BLD.shape[1] else torch.ones_like(before.begun_B1)
        return BlockOutput(y_BLD, RgLruState(conv_BKI, hidden_BI, begun_B1))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return RgLruState(
            self.conv_1d.init_state(batch_size, device=device, dtype=dtype),
            torch.zeros(batch_size, self.config.width, device=device, dtype=torch.float32),
            torch.zeros(batch_size, 1, device=device, dtype=torch.bool),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections, and gates and decays as the authors do; biases are zero."""
        for linear in (self.linear_y, self.linear_x, self.linear_out):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv_1d.reset_parameters()
        self.rg_lru.reset_parameters()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return those of the gates' matrices, whose fan-in is a block's width."""
        config: RgLru.Config = self.config
        if config.d_inner is not None:
            growth = 1.0
        elif config.gate_blocks is not None:
            growth = config.d_model / base_width
        else:
            base = config.replace(d_model=base_width)
            growth = (config.width // config.blocks) / (base.width // base.blocks)
        return {f"rg_lru.{name}_gate_weight": matrix(growth) for name in ("input", "recurrent")}

    def implementations(self, device: torch.device) -> dict[str, str]:
        operations = (scan_kernel.OPERATION, conv_kernel.OPERATION)
        return {op.name: op.describe(device, impl=op.nearest(self.impl)) for op in operations}


class _Recurrence(nn.Module):
    """The recurrence of I channels; its gates' matrices are block-diagonal, H blocks of P by P."""

    def __init__(self, channels: int, heads: int, impl: Impl) -> None:
        super().__init__()
        size = channels // heads
        self.impl = impl
        self.recurrent_param = nn.Parameter(torch.empty(channels))
        self.input_gate_weight, self.recurrent_gate_weight = (
            nn.Parameter(torch.empty(heads, size, size)) for _ in range(2)
        )
        self.input_gate_bias, self.recurrent_gate_bias = (nn.Parameter(torch.empty(heads, size)) for _ in range(2))

    def forward(
        self, u_BLI: Tensor, before: RgLruState | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return h (B, L, I) and, with a state, the next one's (B, I)."""
        wide = torch.promote_types(self.recurrent_param.dtype, torch.float32)
        input_BLI = self._gate(u_BLI, self.input_gate_weight, self.input_gate_bias)
        recurrent_BLI = self._gate(u_BLI, self.recurrent_gate_weight, self.recurrent_gate_bias)
        log_BLI = -_SHARPNESS * recurrent_BLI.to(wide) * F.softplus(self.recurrent_param.to(wide))
        root_BLI = _clipped_root(-torch.expm1(2 * log_BLI))
        first_BL1 = self._first(u_BLI, before, segments_BL)
        x_BLI = (u_BLI * input_BLI).to(wide) * torch.where(first_BL1, torch.ones_like(root_BLI), root_BLI)
        found = scan_kernel.diagonal_scan(
            log_BLI.exp(),
            x_BLI,
            initial_state=None if before is None else before.hidden_BI,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=self.impl,
        )
        h_BLI, hidden_BI = found if isinstance(found, tuple) else (found, None)
        return h_BLI.to(u_BLI.dtype), hidden_BI

    def _gate(self, u_BLI: Tensor, weight_HPP: Tensor, bias_HP: Tensor) -> Tensor:
        u_BLHP = torch.unflatten(u_BLI, -1, bias_HP.shape)
        product_BLHP = torch.einsum("blhi,hij->blhj", u_BLHP, weight_HPP)
        return (product_BLHP + bias_HP).sigmoid().flatten(-2)

    def _first(self, u_BLI: Tensor, before: RgLruState | None, segments_BL: Tensor | None) -> Tensor:
        """Return (B, L, 1) bool, true where a sequence or a document begins."""
        first_BL = torch.zeros(u_BLI.shape[:2], dtype=torch.bool, device=u_BLI.device)
        first_BL[:, :1] = True if before is None else ~before.begun_B1
        if segments_BL is not None:
            first_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
        return first_BL[..., None]

    def reset_parameters(self) -> None:
        """Draw gates of std 1 / sqrt(fan-in), and decays whose squares are uniform in [0.9^2, 0.999^2]."""
        with torch.no_grad():
            for weight in (self.input_gate_weight, self.recurrent_gate_weight):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            for bias in (self.input_gate_bias, self.recurrent_gate_bias):
                bias.zero_()
            low, high = (radius**2 for radius in _RADIUS)
            log = torch.rand_like(self.recurrent_param, dtype=torch.float32).mul_(high - low).add_(low).log_().mul_(0.5)
            self.recurrent_param.copy_((-log).expm1_().log_())  # the inverse of softplus


def _clipped_root(z: Tensor) -> Tensor:
    """Return sqrt(z) with a slope of at most 1,000: what a decay near 1 would make infinite."""
    if not z.requires_grad:
        return z.sqrt()
    fixed = z.detach()
    slope = (4 * fixed).clamp_min(_MAX_SLOPE**-2).rsqrt()
    return fixed.sqrt() + (z - fixed) * slope
