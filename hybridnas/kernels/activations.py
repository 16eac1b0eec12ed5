"""The nonlinearities of feed-forward layers, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def activate(h: Tensor, activation: str, gated: bool) -> Tensor:
    """Apply the nonlinearity; gated: first half of the last axis, activated, times the second half."""
    if not gated:
        return ACTIVATIONS[activation](h)
    gate, up = h.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
