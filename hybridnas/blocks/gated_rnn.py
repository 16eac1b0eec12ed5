"""Gated recurrent networks, letter U: GRU, LSTM, and minGRU, whose gates do not see the state.

Shapes: B batch, L length, D d_model, I d_inner, G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels import diagonal_scan as scan_kernel
from hybridnas.kernels import gated_rnn as rnn_kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, truncated_normal_
from hybridnas.registry import register_block

_GATES = {"gru": 3, "lstm": 4, "mingru": 2}


@register_block("U", name="gated_rnn")
class GatedRnn(Block):
    """``out_proj(h)``, h the hidden states of a GRU, an LSTM or a minGRU of one layer.

    GRU: Cho et al. 2014, with the reset gate after the product as in torch; LSTM: Hochreiter and Schmidhuber 1997, Gers
    et al. 2000; parameter names and layouts are those of torch's GRUCell and LSTMCell. minGRU (Feng et al. 2024, arXiv
    2410.01201, section 3.1): h_t = (1 - z_t) h_{t-1} + z_t n_t with z = sigmoid(W_z x), n = W_n x, the rows of
    ``weight_ih`` in this order, which a scan computes for all steps at once. The state is (h,), of an LSTM (h, c),
    float32.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the gated recurrent network."""

        kind: str = option("gru", "the recurrence", choices=tuple(_GATES))
        d_inner: int | None = option(None, "hidden channels; none: d_model [channels]", ge=1)
        bias: bool = option(True, "biases of the gates, two of each as in torch (of a minGRU one), and of the output")

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, rows = self.d_model, self.width, _GATES[self.kind] * self.width
            recurrent = self.kind != "mingru"
            matrices = rows * d + (rows * di if recurrent else 0) + di * d
            params = matrices + (rows * (2 if recurrent else 1) + d if self.bias else 0)
            inside = rows * (d + di) if recurrent else 0
            flops = 2.0 * (matrices - inside) + sum(self.kernel_flops().values())
            state = 4 * di * (2 if self.kind == "lstm" else 1)
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            """Of GRU and LSTM the products with the gates' matrices, and 12 per channel; of minGRU 5 of a scan."""
            if self.kind == "mingru":
                return {"diagonal_scan": 5.0 * self.width}
            rows = _GATES[self.kind] * self.width
            return {"gated_rnn": 2.0 * rows * (self.d_model + self.width) + 12.0 * self.width}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_inner": self.width}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, rows = config.d_model, config.width, _GATES[config.kind] * config.width
        recurrent = config.kind != "mingru"
        self.weight_ih = nn.Parameter(torch.empty(rows, d))
        self.weight_hh = nn.Parameter(torch.empty(rows, di)) if recurrent else None
        self.bias_ih = nn.Parameter(torch.empty(rows)) if config.bias else None
        self.bias_hh = nn.Parameter(torch.empty(rows)) if config.bias and recurrent else None
        self.out_proj = nn.Linear(di, d, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"kind": "lstm", "d_inner": 20}),
            Variant(fields={"kind": "gru", "d_inner": 9, "bias": False}),
            Variant(fields={"kind": "mingru"}),
            Variant(fields={"kind": "mingru", "d_inner": 20, "bias": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        h_BLI, after = self._scan(x_BLD, state) if self.weight_hh is None else self._step(x_BLD, self.weight_hh, state)
        return BlockOutput(self.out_proj(h_BLI), None if state is None else after)

    def _step(self, x_BLD: Tensor, weight_hh: Tensor, state: State | None) -> tuple[Tensor, State]:
        return rnn_kernel.gated_rnn(
            x_BLD,
            self.weight_ih,
            weight_hh,
            self.bias_ih,
            self.bias_hh,
            state,
            kind=self.config.kind,
            impl=rnn_kernel.OPERATION.nearest(self.impl),
        )

    def _scan(self, x_BLD: Tensor, state: State | None) -> tuple[Tensor, State]:
        gate_BLI, value_BLI = nn.functional.linear(x_BLD, self.weight_ih, self.bias_ih).chunk(2, dim=-1)
        wide = torch.promote_types(gate_BLI.dtype, torch.float32)
        gate_BLI = gate_BLI.to(wide)
        found = scan_kernel.diagonal_scan(
            (-gate_BLI).sigmoid(),
            gate_BLI.sigmoid() * value_BLI.to(wide),
            initial_state=None if state is None else state[0],
            return_final_state=True,
            impl=self.impl,
        )
        return found[0].to(x_BLD.dtype), (found[1],)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        count = 2 if self.config.kind == "lstm" else 1
        shape = (batch_size, self.config.width)
        return tuple(torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(count))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw the gates as torch does, uniform within 1 / sqrt(d_inner), and a truncated-normal output projection."""
        bound = self.config.width**-0.5
        for parameter in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        truncated_normal_(self.out_proj.weight, self.out_proj.in_features, init_scale)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def implementations(self, device: torch.device) -> dict[str, str]:
        operation = (scan_kernel if self.weight_hh is None else rnn_kernel).OPERATION
        return {operation.name: operation.describe(device, impl=operation.nearest(self.impl))}
