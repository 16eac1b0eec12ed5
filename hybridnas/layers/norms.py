"""Norms as modules: RMSNorm, zero-centered RMSNorm and LayerNorm through our kernels, and Mamba-2's gated RMSNorm.

Shapes: B batch, L length, D features, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.hardware import Impl
from hybridnas.kernels.rmsnorm import OPERATION, layer_norm, rms_norm
from hybridnas.layers.mode import has_hooks


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019); parameters as torch's own.

    Without ``scaled`` there is no weight.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, scaled: bool = True, impl: Impl = Impl.AUTO) -> None:
        super().__init__(width, eps=eps, elementwise_affine=scaled)
        self.impl = OPERATION.nearest(impl)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or 0.0, impl=self.impl)


class ZeroCenteredRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), computed in float32 or wider (Gemma, Qwen3-Next).

    The weight starts at 0, so that weight decay, where it reaches norms, pulls the factor towards 1 instead of 0.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps
        self.impl = OPERATION.nearest(impl)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # 1 + weight in bfloat16 would lose small weights
        return rms_norm(x.to(wide), 1 + self.weight.to(wide), self.eps, impl=self.impl).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 0, which is a factor of 1."""
        nn.init.zeros_(self.weight)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba, Kiros and Hinton 2016); parameters as torch's own."""

    def __init__(self, width: int, eps: float = 1e-5, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(width, eps=eps)
        self.impl = OPERATION.nearest(impl)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, impl=self.impl)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "rmsnorm_zero": ZeroCenteredRMSNorm,
}


def silu_gated(y: Tensor, z: Tensor) -> Tensor:
    """Return y silu(z) in y's dtype, computed in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * F.silu(z.to(wide))).to(y.dtype)


class GatedRMSNorm(nn.Module):
    """weight * rmsnorm(y silu(z)), each group of channels by itself, computed in float32 or wider."""

    def __init__(self, width: int, group: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.group, self.eps = group, eps

    def forward(self, y_BLI: Tensor, z_BLI: Tensor) -> Tensor:
        wide = torch.promote_types(y_BLI.dtype, torch.float32)
        gated = y_BLI.to(wide) * F.silu(z_BLI.to(wide))
        gated = gated.reshape(*gated.shape[:-1], gated.shape[-1] // self.group, self.group)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.eps)
        scaled: Tensor = self.weight * normed.flatten(-2).to(y_BLI.dtype)
        return scaled


def one_row(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a norm for a few float32 rows without gradients, free of the checks that would cost more than they.

    Its numbers are the module's; a module of another class, with hooks, or of a named implementation is returned as
    it is.
    """
    known = (RMSNorm, ZeroCenteredRMSNorm, LayerNorm)
    if not isinstance(norm, known) or has_hooks(norm) or norm.impl is not Impl.AUTO:
        return norm
    weight, eps = norm.weight, norm.eps or 0.0
    size = weight.shape
    if isinstance(norm, LayerNorm):
        bias = norm.bias
        return lambda x_BD: F.layer_norm(x_BD, size, weight, bias, eps) if x_BD.dtype == weight.dtype else norm(x_BD)
    factor = weight if isinstance(norm, RMSNorm) else 1 + weight.float()
    return lambda x_BD: F.rms_norm(x_BD, size, factor, eps) if x_BD.dtype == torch.float32 else norm(x_BD)
