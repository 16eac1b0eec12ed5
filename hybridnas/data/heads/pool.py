"""A head that reads the mean of all positions so far, for tasks whose answer is one label of a whole sequence.

Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanPool(nn.Module):
    """The mean of the vectors up to each place, in float32; at the last place that of the whole sequence."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D): at each place the mean of the vectors there and before."""
        count_L1 = torch.arange(1, x_BLD.shape[1] + 1, device=x_BLD.device, dtype=torch.float32)[:, None]
        return (x_BLD.float().cumsum(dim=1) / count_L1).to(x_BLD.dtype)
