"""A linear layer whose output is used in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.layers.mode import has_hooks


def split_linear(linear: nn.Module, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return linear(x) split along the last dimension, of these sizes.

    In training on a processor as one product for each part: the gradients of the parts of one product would be copied
    together, a tenth to a fifth of the product's own time, and whole rows are the nearer ones for what reads them.
    """
    apart = torch.is_grad_enabled() and x.device.type == "cpu"
    if not apart or type(linear) is not nn.Linear or has_hooks(linear):
        whole: Tensor = linear(x)
        return torch.split(whole, list(sizes), dim=-1)
    weights = torch.split(linear.weight, list(sizes))
    biases = [None] * len(sizes) if linear.bias is None else torch.split(linear.bias, list(sizes))
    return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
