"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) as their papers write them: the specification.

Shapes: N rows (any number of leading dimensions), D features. Statistics in float32 or wider.

    rms_norm    y = x / sqrt(mean(x^2) + eps) * weight
    layer_norm  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,   var with 1 / D
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.kernels._inputs import state_dtype


def norm_reference(
    x_ND: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, *, centered: bool
) -> Tensor:
    """Return y in x's dtype; ``centered`` is LayerNorm, else RMSNorm. Differentiable by plain autograd."""
    dtype = state_dtype(x_ND)
    wide_ND = x_ND.to(dtype)
    if centered:
        wide_ND = wide_ND - wide_ND.mean(-1, keepdim=True)
    y_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + eps)
    if weight_D is not None:
        y_ND = y_ND * weight_D.to(dtype)
    if bias_D is not None:
        y_ND = y_ND + bias_D.to(dtype)
    return y_ND.to(x_ND.dtype)
