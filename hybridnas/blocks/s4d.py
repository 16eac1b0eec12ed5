"""S4D, letter D: a diagonal, time-invariant state space of each channel (Gu, Gupta, Goel and Ré 2022).

Shapes: B batch, L length, D d_model, I channels of the state space, N d_state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels import diagonal_ssm as kernel
from hybridnas.kernels.activations import ACTIVATIONS
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
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block


@exportable
class S4dState(NamedTuple):
    """The states of all channels, (B, I, N) or as real and imaginary parts of one of each pair, (B, I, N / 2, 2)."""

    hidden: Tensor


@register_block("D", name="s4d")
class S4d(Block):
    """``glu(out_proj(act(ssm(u))))`` with u = x or in_proj(x): arXiv 2206.11893, as the authors' s4d.py.

    Nothing in the state space depends on the input, so that a sequence is read as a convolution by FFT and one token as
    a step of the recurrence.
    """

    float32 = tuple(f"ssm.{name}" for name in OWN_FLOAT32)
    no_decay = tuple(f"ssm.{name}" for name in OWN_NO_DECAY)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the S4D block."""

        d_state: int = option(64, "real numbers in the state of a channel, N [count]", ge=1)
        init: str = option("lin", INIT_DOC, choices=INITS)
        d_inner: int | None = option(
            None, "channels of the state space, behind a projection; none: d_model, without one [channels]", ge=1
        )
        activation: str = option("gelu", "nonlinearity after the state space", choices=tuple(ACTIVATIONS))
        glu: bool = option(True, "the output projection is twice as wide and one half gates the other")
        bias: bool = option(True, "biases of the projections")

        def __post_init__(self) -> None:
            super().__post_init__()
            check_states(self.label(), self.d_state, self.init)

        @property
        def width(self) -> int:
            """Return the channels of the state space."""
            return self.d_inner if self.d_inner is not None else self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, outputs = self.d_model, self.width, self.d_model * (2 if self.glu else 1)
            matrices = di * outputs + (0 if self.d_inner is None else d * di)
            biases = (outputs + (0 if self.d_inner is None else di)) if self.bias else 0
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            params = matrices + biases + states_params(di, self.d_state)
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=4 * di * self.d_state)

        def kernel_flops(self) -> dict[str, float]:
            return {"diagonal_ssm": states_flops(self.width, self.d_state, self.init)}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di = config.d_model, config.width
        self.in_proj = None if config.d_inner is None else nn.Linear(d, di, bias=config.bias)
        self.ssm = DiagonalStates(di, config.d_state, config.init, impl=impl)
        self.out_proj = nn.Linear(di, d * (2 if config.glu else 1), bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"init": "inv", "d_state": 6, "d_inner": 20, "bias": False}),
            Variant(fields={"init": "real", "d_state": 5, "activation": "silu", "glu": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        before = None if state is None else cast(S4dState, state).hidden
        u_BLI = x_BLD if self.in_proj is None else self.in_proj(x_BLD)
        y_BLI, after = self.ssm(u_BLI, before, segments_BL)
        y_BLD = self.out_proj(ACTIVATIONS[self.config.activation](y_BLI.to(x_BLD.dtype)))
        if self.config.glu:
            y_BLD = F.glu(y_BLD, dim=-1)
        return BlockOutput(y_BLD, None if after is None else S4dState(after))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return S4dState(self.ssm.init_state(batch_size, device=device))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections with biases of zero, and the authors' state space."""
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                truncated_normal_(linear.weight, linear.in_features, init_scale)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        self.ssm.reset_parameters()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of C, whose fan-in is the state of a channel."""
        return {"ssm.C": matrix(1.0)}

    def implementations(self, device: torch.device) -> dict[str, str]:
        return {kernel.OPERATION.name: kernel.OPERATION.describe(device, impl=self.ssm.impl)}
