"""Feed-forward block, letter F: up, nonlinearity, down; gated (SwiGLU and kin) or not.

Shapes: B batch, L length, D d_model, F d_ff.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.hardware import Impl
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant
from hybridnas.layers.feed_forward import FeedForward, feed_forward_params
from hybridnas.layers.norms import one_row
from hybridnas.registry import register_block


@register_block("F", name="mlp", aliases=("-",))
class Mlp(Block):
    """Position-wise feed-forward network (Vaswani 2017; gated form: Shazeer 2020)."""

    role = "feed_forward"

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the feed-forward block."""

        d_ff: int | None = option(None, "hidden width, of each branch when gated; none: 4 * d_model [channels]", ge=1)
        activation: str = option("relu", "nonlinearity", choices=tuple(ACTIVATIONS))
        gated: bool = option(False, "multiply by a second, linear branch (silu: SwiGLU)")
        bias: bool = option(True, "biases on both linear layers")

        @property
        def hidden(self) -> int:
            """Return d_ff with its default resolved."""
            return self.d_ff if self.d_ff is not None else 4 * self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            params = feed_forward_params(self.d_model, self.hidden, gated=self.gated, bias=self.bias)
            matrices = feed_forward_params(self.d_model, self.hidden, gated=self.gated, bias=False)
            return Cost(params=params, active_params=params, flops_per_token=2.0 * matrices)

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_ff": self.hidden}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.ff = FeedForward(
            config.d_model, config.hidden, activation=config.activation, gated=config.gated, bias=config.bias
        )
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_ff": 24, "activation": "gelu"}),
            Variant(fields={"d_ff": 24, "gated": True, "activation": "silu", "bias": False}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        return BlockOutput(self.ff(x_BLD), state)

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not Mlp.forward:
            return None
        normed = one_row(norm)
        return lambda x_BD: x_BD + self.ff(normed(x_BD))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        return ()

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        self.ff.reset_parameters(init_scale)
