"""The scan of a diagonal linear recurrence, step by step: the specification.

Shapes: B batch, L length, D channels.

    h_t = a_t h_{t-1} + x_t,   h_0 is the initial state, or zero; zero again where a document begins
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries


class Inputs(NamedTuple):
    """The arguments of a scan, in the order of ``diagonal_scan``."""

    a: Tensor  # (B, L, D), real or complex
    x: Tensor  # (B, L, D)
    initial_state: Tensor | None = None  # (B, D)
    seq_idx: Tensor | None = None  # (B, L) integers

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums: at least float32 or complex64."""
        return torch.promote_types(torch.promote_types(self.a.dtype, self.x.dtype), torch.float32)

    @property
    def first(self) -> Tensor:
        """The state before the first step, (B, D)."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        return self.x.new_zeros(self.x.shape[0], self.x.shape[2], dtype=self.dtype)


def scan_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return h (B, L, D) in x's dtype and the final state (B, D), one step at a time, by plain autograd."""
    a, x, _, seq_idx = inputs
    h_BD, starts = inputs.first, None if seq_idx is None else boundaries(seq_idx).unbind(1)
    if not x.shape[1]:
        return x + a, h_BD  # empty, and depends on both
    outputs = []
    for t, (a_BD, x_BD) in enumerate(zip(a.to(inputs.dtype).unbind(1), x.to(inputs.dtype).unbind(1), strict=True)):
        if starts is not None:
            h_BD = torch.where(starts[t][:, None], torch.zeros_like(h_BD), h_BD)
        h_BD = a_BD * h_BD + x_BD
        outputs.append(h_BD)
    return torch.stack(outputs, 1).to(x.dtype), h_BD
