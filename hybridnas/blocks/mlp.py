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
from hybridnas.layers.token_shift import mixing_of, token_before
from hybridnas.registry import register_block


@register_block("F", name="mlp", aliases=("-",))
class Mlp(Block):
    """Position-wise feed-forward network (Vaswani 2017; gated form: Shazeer 2020).

    With ``token_shift`` it reads x + x_k * (token before - x): RWKV-7's channel mix (2503.14456, section 3) with relu2
    and no biases.
    """

    role = "feed_forward"
    outputs = ("ff.down_proj",)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the feed-forward block."""

        d_ff: int | None = option(None, "hidden width, of each branch when gated; none: 4 * d_model [channels]", ge=1)
        activation: str = option("relu", "nonlinearity", choices=tuple(ACTIVATIONS))
        gated: bool = option(False, "multiply by a second, linear branch (silu: SwiGLU)")
        bias: bool = option(True, "biases on both linear layers")
        token_shift: bool = option(False, "read a mixture of the token and the one before, by channel (RWKV)")

        @property
        def hidden(self) -> int:
            """Return d_ff with its default resolved."""
            return self.d_ff if self.d_ff is not None else 4 * self.d_model

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            params = feed_forward_params(self.d_model, self.hidden, gated=self.gated, bias=self.bias)
            matrices = feed_forward_params(self.d_model, self.hidden, gated=self.gated, bias=False)
            mixed = self.d_model if self.token_shift else 0
            return Cost(
                params=params + mixed,
                active_params=params + mixed,
                flops_per_token=2.0 * matrices,
                state_bytes=mixed * dtype_bytes,
            )

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "d_ff": self.hidden}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.ff = FeedForward(
            config.d_model, config.hidden, activation=config.activation, gated=config.gated, bias=config.bias
        )
        self.x_k = nn.Parameter(torch.empty(config.d_model)) if config.token_shift else None
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"d_ff": 24, "activation": "gelu"}),
            Variant(fields={"d_ff": 24, "gated": True, "activation": "silu", "bias": False}),
            Variant(fields={"activation": "relu2", "bias": False, "token_shift": True}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        if self.x_k is None:
            return BlockOutput(self.ff(x_BLD), state)
        before_BLD = token_before(x_BLD, None if state is None else state[0], segments_BL)
        y_BLD = self.ff(torch.addcmul(x_BLD, before_BLD - x_BLD, self.x_k))
        if state is None or not x_BLD.shape[1]:
            return BlockOutput(y_BLD, state)
        return BlockOutput(y_BLD, (x_BLD[:, -1],))

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not Mlp.forward or self.x_k is not None:
            return None
        normed = one_row(norm)
        return lambda x_BD: x_BD + self.ff(normed(x_BD))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        if self.x_k is None:
            return ()
        return (torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype),)

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal matrices, zero biases; mix as RWKV-7 does in its middle layer."""
        self.ff.reset_parameters(init_scale)
        if self.x_k is not None:
            mixing_of(self.x_k, 0.5**4)
