"""H3, letter H: two time-invariant state spaces between gates, one that shifts and one that remembers (Fu et al. 2022).

Shapes: B batch, L length, D d_model, I d_inner, G heads of P channels, K taps of the shift, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as conv_kernel
from hybridnas.kernels import diagonal_ssm as kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.diagonal_states import (
    INIT_DOC,
    INITS,
    OWN_FLOAT32,
    OWN_NO_DECAY,
    DiagonalStates,
    check_states,
    states_flops,
    states_params,
)
from hybridnas.layers.short_conv import ShortConvolution
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block


@exportable
class H3State(NamedTuple):
    """The last K - 1 keys, and the states of the diagonal state space, float32."""

    keys_BKI: Tensor
    hidden: Tensor  # (B, I P, N), or (B, I P, N / 2, 2) where it is complex


@register_block("H", name="h3")
class H3(Block):
    """``out_proj(q * ssm(shift(k) * v))``: arXiv 2212.14052, section 3 and algorithm 1.

    The shift state space of K states is a causal filter of K free taps; the diagonal one is S4D's, one system for each
    head. In heads of P channels k v^T is an outer product, P^2 sequences with one filter, and q is multiplied from the
    left; P = 1 multiplies channel by channel.
    """

    float32 = tuple(f"ssm.{name}" for name in OWN_FLOAT32)
    no_decay = tuple(f"ssm.{name}" for name in OWN_NO_DECAY)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the H3 block."""

        d_state: int = option(64, "real numbers in a state of the diagonal state space, N [count]", ge=1)
        init: str = option("lin", INIT_DOC, choices=INITS)
        d_conv: int = option(64, "taps of the shift, the states of its state space [tokens]", ge=1)
        head_dim: int = option(1, "channels of a head [channels]", ge=1)
        d_inner: int | None = option(None, "channels of queries, keys and values; none: d_model [channels]", ge=1)
        bias: bool = option(True, "biases of the projections")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_states(self.label(), self.d_state, self.init)
            if self.width % self.head_dim:
                raise ConfigError(
                    f"{self.label()} head_dim={self.head_dim} does not divide the inner width {self.width}; use "
                    f"head_dim=1",
                    field="head_dim",
                    got=self.head_dim,
                    allowed=f"a divisor of {self.width}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di = self.d_model, self.width
            biases = 3 * di + d if self.bias else 0
            params = 4 * d * di + biases + di * self.d_conv + states_params(di // self.head_dim, self.d_state)
            flops = 8.0 * d * di + sum(self.kernel_flops().values())
            state = (self.d_conv - 1) * di * dtype_bytes + 4 * di * self.head_dim * self.d_state
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            states = states_flops(self.width * self.head_dim, self.d_state, self.init)
            return {"diagonal_ssm": states, "causal_conv1d": 2.0 * self.d_conv * self.width}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_inner": self.width}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, heads = config.d_model, config.width, config.width // config.head_dim
        self.in_proj = nn.Linear(d, 3 * di, bias=config.bias)
        # so many taps have neither C nor Triton
        self.shift_impl = impl if impl in (Impl.REFERENCE, Impl.TORCH) else Impl.AUTO
        self.conv1d = ShortConvolution(di, config.d_conv, bias=False, activation=None, impl=self.shift_impl)
        self.ssm = DiagonalStates(di * config.head_dim, config.d_state, config.init, systems=heads, impl=impl)
        self.out_proj = nn.Linear(di, d, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_state": 6, "init": "inv", "d_conv": 3, "head_dim": 2}),
            Variant(fields={"d_state": 5, "init": "real", "d_conv": 1, "d_inner": 20, "bias": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        before = None if state is None else cast(H3State, state)
        q_BLI, k_BLI, v_BLI = self.in_proj(x_BLD).chunk(3, dim=-1)
        k_BLI, keys_BKI = self.conv1d(k_BLI, None if before is None else before.keys_BKI, segments_BL)
        q_BLGP, k_BLGP, v_BLGP = (
            torch.unflatten(part, -1, (-1, self.config.head_dim)) for part in (q_BLI, k_BLI, v_BLI)
        )
        u_BLX = (k_BLGP[..., :, None] * v_BLGP[..., None, :]).flatten(2)
        y_BLX, hidden = self.ssm(u_BLX, None if before is None else before.hidden, segments_BL)
        y_BLGPP = torch.unflatten(y_BLX, -1, (-1, self.config.head_dim, self.config.head_dim))
        y_BLI = (q_BLGP[..., :, None] * y_BLGPP).sum(-2).flatten(2)
        y_BLD = self.out_proj(y_BLI.to(x_BLD.dtype))
        if keys_BKI is None or hidden is None:
            return BlockOutput(y_BLD, None)
        return BlockOutput(y_BLD, H3State(keys_BKI, hidden))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        keys = self.conv1d.init_state(batch_size, device=device, dtype=dtype)
        return H3State(keys, self.ssm.init_state(batch_size, device=device))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections with biases of zero, torch's own taps, and S4D's state space."""
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.conv1d.reset_parameters()
        self.ssm.reset_parameters()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of C, whose fan-in is the state of a channel."""
        return {"ssm.C": matrix(1.0)}

    def implementations(self, device: torch.device) -> dict[str, str]:
        found = {kernel.OPERATION.name: kernel.OPERATION.describe(device, impl=self.ssm.impl)}
        return {**found, conv_kernel.OPERATION.name: conv_kernel.OPERATION.describe(device, impl=self.shift_impl)}
