"""Rotary positions: channel pairs of queries and keys turned by angles that grow with the position (Su 2021).

Shapes: ... any leading dimensions, L length, P head width, R turned channels, h = R / 2 pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(
    start: int, length: int, width: int, base: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (L, h) of positions ``start`` on: pair i turns by position * base ** (-i / h)."""
    half = width // 2
    frequency_h = base ** (-torch.arange(half, device=device, dtype=dtype) / half)
    angle_Lh = torch.arange(start, start + length, device=device, dtype=dtype)[:, None] * frequency_h
    return angle_Lh.cos(), angle_Lh.sin()


class Angles:
    """Cosines and sines of one position after another, computed for many positions at a time."""

    def __init__(self, width: int, base: float, device: torch.device) -> None:
        self._width, self._base, self._device = width, base, device
        self._start, self._count = 0, 0

    def at(self, position: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (h,) of a position."""
        if not self._start <= position < self._start + self._count:
            self._start, self._count = position, 256
            self._cos_Lh, self._sin_Lh = rotation(position, 256, self._width, self._base, self._device)
        return self._cos_Lh[position - self._start], self._sin_Lh[position - self._start]


def rotate(x_LP: Tensor, cos_Lh: Tensor, sin_Lh: Tensor) -> Tensor:
    """Turn pairs (i, i + h) of the first 2h channels of x (..., L, P), in float32 or wider; others stay as they are."""
    half = cos_Lh.shape[-1]
    first, second = x_LP[..., :half], x_LP[..., half : 2 * half]
    turned = [first * cos_Lh - second * sin_Lh, second * cos_Lh + first * sin_Lh]
    if 2 * half < x_LP.shape[-1]:
        turned.append(x_LP[..., 2 * half :].to(turned[0].dtype))
    return torch.cat(turned, dim=-1).to(x_LP.dtype)
