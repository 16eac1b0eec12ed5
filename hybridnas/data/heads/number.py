"""A head that predicts a number rather than an id: a linear map to one value, of each place or of the mean so far.

Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

from torch import Tensor, nn

from hybridnas.data.heads.pool import MeanPool


class Number(nn.Module):
    """One predicted value at each place, in the targets' standard deviations."""

    def __init__(self, d_model: int, pool: str) -> None:
        """``pool``: last, what stands at a place itself, or mean, the mean up to it."""
        super().__init__()
        self.pool = MeanPool() if pool == "mean" else nn.Identity()
        self.value = nn.Linear(d_model, 1)
        nn.init.zeros_(self.value.weight)  # the first prediction is the mean of the training part
        nn.init.zeros_(self.value.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, 1)."""
        y_BL1: Tensor = self.value(self.pool(x_BLD))
        return y_BL1
