"""The task head of MAD's compression (arXiv 2403.17844): predictions for all places out of one position.

The vector that the model holds at the last position, plus sines and cosines of the place that is asked for, goes
through norm, linear, GELU twice and a last norm to the model's own output matrix. Shapes: B batch, L length, D d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STD = 0.02  # of the initial weights, as in mad-lab
_LONGEST = 10_000.0  # wavelength of the slowest sine, over 2 pi [tokens]


class Readout(nn.Module):
    """One vector and a place in, one vector for the output matrix out; two layers of the model's width."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(d_model), nn.Linear(d_model, d_model), nn.GELU(),
            nn.RMSNorm(d_model), nn.Linear(d_model, d_model), nn.GELU(),
            nn.RMSNorm(d_model),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D): for each place what the output matrix reads, made of the last position's vector alone."""
        y_BLD: Tensor = self.layers(x_BLD[:, -1:] + _places(x_BLD))
        return y_BLD


def _places(x_BLD: Tensor) -> Tensor:
    """Return (L, D) sines and cosines of the places 0 to L-1."""
    length, width = x_BLD.shape[1:]
    half = (width + 1) // 2
    rates = _LONGEST ** -(torch.arange(half, device=x_BLD.device, dtype=torch.float32) / max(1, half - 1))
    angles = torch.arange(length, device=x_BLD.device, dtype=torch.float32)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width].to(x_BLD.dtype)
