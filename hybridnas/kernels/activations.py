"""The nonlinearities of feed-forward layers, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def relu2(h: Tensor) -> Tensor:
    """Return max(h, 0) ** 2 (Primer, arXiv 2109.08668), as Nemotron-H's feed-forward layers have it."""
    return F.relu(h).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu2": relu2,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activate(h: Tensor, activation: str, gated: bool) -> Tensor:
    """Apply the nonlinearity; gated: first half of the last axis, activated, times the second half."""
    if not gated:
        return ACTIVATIONS[activation](h)
    gate, up = h.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
