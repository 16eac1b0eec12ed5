"""The scan of a diagonal linear recurrence as an associative scan in plain torch, on any device, of any dtype.

Two steps in one are a step, (a2, x2) after (a1, x1) = (a2 a1, a2 x1 + x2): pairs of steps make a sequence of half the
length, whose scan gives every second state; the others are one step further (Blelloch 1990). The work grows with the
length, the number of operations with its logarithm. Shapes: B batch, L length, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels.diagonal_scan.reference import Inputs


def scan_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return h (B, L, D) in x's dtype and the final state (B, D), differentiable by plain autograd."""
    a, x, _, seq_idx = inputs
    if not x.shape[1]:
        return x + a, inputs.first  # empty, and depends on both
    a_BLD, x_BLD = a.to(inputs.dtype), x.to(inputs.dtype)
    if seq_idx is not None:
        a_BLD = torch.where(boundaries(seq_idx)[..., None], torch.zeros_like(a_BLD), a_BLD)
    first_B1D = torch.addcmul(x_BLD[:, :1], a_BLD[:, :1], inputs.first[:, None])
    x_BLD = torch.cat([first_B1D, x_BLD[:, 1:]], 1)
    h_BLD = _states(a_BLD, x_BLD)
    return h_BLD.to(x.dtype), h_BLD[:, -1]


def _states(a_BLD: Tensor, x_BLD: Tensor) -> Tensor:
    """Return h (B, L, D) from a zero state; the first a is not read."""
    length = x_BLD.shape[1]
    if length == 1:
        return x_BLD
    first_a, second_a = a_BLD[:, : length - 1 : 2], a_BLD[:, 1::2]
    pairs_x = torch.addcmul(x_BLD[:, 1::2], second_a, x_BLD[:, : length - 1 : 2])
    odd_BLD = _states(second_a * first_a, pairs_x)  # h_1, h_3 ..., counted from 0
    rest = (length - 1) // 2
    even_BLD = torch.addcmul(x_BLD[:, 2::2], a_BLD[:, 2::2], odd_BLD[:, :rest])
    h_BLD = torch.empty_like(x_BLD, memory_format=torch.contiguous_format)
    h_BLD[:, :1] = x_BLD[:, :1]
    h_BLD[:, 1::2] = odd_BLD
    h_BLD[:, 2::2] = even_BLD
    return h_BLD
