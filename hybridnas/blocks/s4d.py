"""S4D, letter D: a diagonal, time-invariant state space of each channel (Gu, Gupta, Goel and Ré 2022).

Shapes: B batch, L length, D d_model, I channels of the state space, N d_state.
"""

from __future__ import annotations

import math
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
from hybridnas.kernels import diagonal_ssm as kernel
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_DT_MIN, _DT_MAX = 1e-3, 1e-1  # range of the step sizes at initialisation


@exportable
class S4dState(NamedTuple):
    """The states of all channels, (B, I, N) or as real and imaginary parts of one of each pair, (B, I, N / 2, 2)."""

    hidden: Tensor


@register_block("D", name="s4d")
class S4d(Block):
    """``glu(out_proj(act(y + D u)))`` with y = S4D(u), u = x or in_proj(x): arXiv 2206.11893, as the authors' s4d.py.

    h_t = exp(dt A) h_{t-1} + u_t, y_t = Re(sum of C (exp(dt A) - 1) / A h_t): zero-order hold, with B of 1 (section
    3.1). States come in conjugate pairs, of which one is computed and counted twice; ``real`` ones are alone. Nothing
    depends on the input, so that a sequence is read as a convolution by FFT and one token as a step of the recurrence.
    """

    float32 = ("log_dt", "log_A_real", "A_imag", "C", "D")
    no_decay = ("log_A_real", "A_imag")

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the S4D block."""

        d_state: int = option(64, "real numbers in the state of a channel, N [count]", ge=1)
        init: str = option(
            "lin",
            "A at first, n-th of N states: lin -1/2 + i pi n, inv -1/2 + i N/pi (N / (2n + 1) - 1), real -(n + 1)",
            choices=("lin", "inv", "real"),
        )
        d_inner: int | None = option(
            None, "channels of the state space, behind a projection; none: d_model, without one [channels]", ge=1
        )
        activation: str = option("gelu", "nonlinearity after the state space", choices=tuple(ACTIVATIONS))
        glu: bool = option(True, "the output projection is twice as wide and one half gates the other")
        bias: bool = option(True, "biases of the projections")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.init != "real" and self.d_state % 2:
                raise ConfigError(
                    f"{self.label()} d_state={self.d_state} must be even, since complex states come in pairs; use "
                    f"d_state={self.d_state + 1}, or init='real'",
                    field="d_state",
                    got=self.d_state,
                    allowed="an even number",
                )

        @property
        def width(self) -> int:
            """Return the channels of the state space."""
            return self.d_inner if self.d_inner is not None else self.d_model

        @property
        def states(self) -> int:
            """Return how many states of a channel are computed: one of each pair."""
            return self.d_state if self.init == "real" else self.d_state // 2

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, outputs = self.d_model, self.width, self.d_model * (2 if self.glu else 1)
            matrices = di * outputs + (0 if self.d_inner is None else d * di)
            biases = (outputs + (0 if self.d_inner is None else di)) if self.bias else 0
            own = di * self.d_state * 2 + 2 * di  # A and C, dt and D
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            params = matrices + biases + own
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=4 * di * self.d_state)

        def kernel_flops(self) -> dict[str, float]:
            """Per state of the recurrence 4 (decay h, + u, weight h, +), 11 where it is complex.

            The convolution by FFT does less at any length above a few tokens.
            """
            return {"diagonal_ssm": float(self.width * self.states * (4 if self.init == "real" else 11))}

        def canonical(self) -> dict[str, Any]:
            return self.to_dict()

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, n, real = config.d_model, config.width, config.states, config.init == "real"
        self.in_proj = None if config.d_inner is None else nn.Linear(d, di, bias=config.bias)
        self.log_dt = nn.Parameter(torch.empty(di))
        self.log_A_real = nn.Parameter(torch.empty(di, n))
        self.A_imag = None if real else nn.Parameter(torch.empty(di, n))
        self.C = nn.Parameter(torch.empty((di, n) if real else (di, n, 2)))
        self.D = nn.Parameter(torch.empty(di))
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
        log_decay_IN, weight_IN = self.discretized()
        if before is not None and self.A_imag is not None:
            before = torch.complex(before[..., 0], before[..., 1])
        found = kernel.diagonal_ssm(
            u_BLI,
            log_decay_IN,
            weight_IN,
            before,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=kernel.OPERATION.nearest(self.impl),
        )
        y_BLI, after = found if isinstance(found, tuple) else (found, None)
        y_BLI = ACTIVATIONS[self.config.activation]((y_BLI + self.D * u_BLI).to(x_BLD.dtype))
        y_BLD = self.out_proj(y_BLI)
        if self.config.glu:
            y_BLD = F.glu(y_BLD, dim=-1)
        if after is not None and after.is_complex():
            after = torch.view_as_real(after)
        return BlockOutput(y_BLD, None if after is None else S4dState(after))

    def discretized(self) -> tuple[Tensor, Tensor]:
        """Return dt A and the weights of the states in the output, (I, N), real or complex."""
        wide = torch.promote_types(self.log_dt.dtype, torch.float32)
        A_IN, C_IN = -self.log_A_real.to(wide).exp(), self.C.to(wide)
        if self.A_imag is not None:
            A_IN = torch.complex(A_IN, self.A_imag.to(wide))
            C_IN = 2 * torch.complex(C_IN[..., 0], C_IN[..., 1])  # with its conjugate
        log_decay_IN = A_IN * self.log_dt.to(wide).exp()[:, None]
        return log_decay_IN, C_IN * torch.expm1(log_decay_IN) / A_IN

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        shape = self.C.shape if self.A_imag is not None else self.log_A_real.shape
        return S4dState(torch.zeros(batch_size, *shape, device=device, dtype=torch.float32))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections with biases of zero, and the authors' state space."""
        for linear in (self.in_proj, self.out_proj):
            if linear is not None:
                truncated_normal_(linear.weight, linear.in_features, init_scale)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        size = self.config.d_state
        with torch.no_grad():
            low, high = math.log(_DT_MIN), math.log(_DT_MAX)
            self.log_dt.uniform_(low, high)
            n = torch.arange(self.config.states, dtype=torch.float32, device=self.log_dt.device)
            if self.A_imag is None:
                self.log_A_real.copy_((n + 1).log().expand_as(self.log_A_real))
            else:
                self.log_A_real.fill_(math.log(0.5))
                imag = math.pi * n if self.config.init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
                self.A_imag.copy_(imag.expand_as(self.A_imag))
            self.C.normal_(std=1.0 if self.A_imag is None else 0.5**0.5)
            self.D.normal_()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of C, whose fan-in is the state of a channel."""
        return {"C": matrix(1.0)}

    def implementations(self, device: torch.device) -> dict[str, str]:
        operation = kernel.OPERATION
        return {operation.name: operation.describe(device, impl=operation.nearest(self.impl))}
