"""RMSNorm on a processor, where torch's own is a chain of eight unfused operations with twice the backward's.

Shapes: N rows, D features. The backward hands torch's fused LayerNorm kernel a mean of zero and our reciprocal of the
root mean square as its deviation; what LayerNorm subtracts too much, mean(dy * weight) / rms, is added back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybridnas.kernels._inputs import state_dtype


def _forward(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    # vector_norm reads x once and keeps nothing, x.square().mean() writes a tensor of its size
    rms_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True).square_().div_(x_ND.shape[1]).add_(eps).rsqrt_()
    y_ND = x_ND * rms_N1
    return y_ND if weight_D is None else y_ND.mul_(weight_D), rms_N1


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        y_ND, rms_N1 = _forward(x_ND, weight_D, eps)
        ctx.save_for_backward(x_ND, weight_D, rms_N1)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_D, rms_N1 = ctx.saved_tensors
        size, wants = x_ND.shape[1], [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        dx_ND, dweight_D, _ = torch.ops.aten.native_layer_norm_backward(
            dy_ND.contiguous(), x_ND, [size], torch.zeros_like(rms_N1), rms_N1, weight_D, None, wants
        )
        if wants[0]:
            sum_N1 = dy_ND.sum(1, keepdim=True) if weight_D is None else torch.mv(dy_ND, weight_D)[:, None]
            dx_ND.add_(sum_N1.mul(rms_N1).div_(size))
        return dx_ND, dweight_D, None


def rms_norm_fast(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Return y (N, D) in x's dtype, computed in float32 or wider."""
    dtype = state_dtype(x_ND)
    wide_D = None if weight_D is None else weight_D.to(dtype)
    y_ND: Tensor = _RMSNorm.apply(x_ND.to(dtype).contiguous(), wide_D, eps)  # type: ignore[no-untyped-call]
    return y_ND.to(x_ND.dtype)
