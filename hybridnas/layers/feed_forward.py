"""A dense feed-forward layer: the mlp block, and the expert of a mixture that every token sees.

Shapes: B batch, L length, D d_model, F d_ff.
"""

from __future__ import annotations

from torch import Tensor, nn

from hybridnas.kernels.activations import activate
from hybridnas.layers.block import truncated_normal_


def feed_forward_params(d_model: int, d_ff: int, *, gated: bool, bias: bool) -> int:
    """Return the weights of a feed-forward layer [count]: two matrices, three when gated."""
    first = 2 * d_ff if gated else d_ff
    return d_model * first + d_ff * d_model + (first + d_model if bias else 0)


class FeedForward(nn.Module):
    """Two linear layers around a nonlinearity; gated: ``up_proj`` yields gate and value side by side."""

    def __init__(self, d_model: int, d_ff: int, *, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gated = gated
        self.up_proj = nn.Linear(d_model, 2 * d_ff if gated else d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.down_proj(activate(self.up_proj(x_BLD), self.activation, self.gated))
        return y_BLD

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal matrices, zero biases, as the MoE-Mamba code does."""
        for linear in (self.up_proj, self.down_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
