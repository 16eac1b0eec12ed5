"""RMSNorm and LayerNorm in torch's operations, on any device.

LayerNorm is torch's own everywhere, RMSNorm on a GPU and under torch.compile. On a CPU torch's RMSNorm is a chain of
eight unfused operations, and twice as many in the backward; here an own backward runs, 2 to 3 times faster.

Shapes: N rows, D features. The own backward calls torch's fused LayerNorm kernel with a mean of zero and with
the reciprocal of the root mean square as its deviation; what LayerNorm subtracts too much, mean(dy * weight) / rms,
is added back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import state_dtype
from hybridnas.kernels._register import differentiable_once


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
    @differentiable_once("rms_norm")
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


def _own_backward(x_ND: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    """Return y (N, D) in x's dtype, computed in float32 or wider."""
    dtype = state_dtype(x_ND)
    wide_D = None if weight_D is None else weight_D.to(dtype)
    y_ND: Tensor = _RMSNorm.apply(x_ND.to(dtype).contiguous(), wide_D, eps)  # type: ignore[no-untyped-call]
    return y_ND.to(x_ND.dtype)


def norm_eager(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, *, centered: bool) -> Tensor:
    """Return y (..., D) in x's dtype; ``centered`` is LayerNorm, else RMSNorm."""
    # torch's CPU kernel sums the weights' gradients in bfloat16: a percent off after 40 rows
    dtype = state_dtype(x) if x.device.type == "cpu" else x.dtype
    weight_D, bias_D = (None if t is None else t.to(dtype) for t in (weight_D, bias_D))
    size = (x.shape[-1],)
    if centered:
        return F.layer_norm(x.to(dtype), size, weight_D, bias_D, eps).to(x.dtype)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x.to(dtype), size, weight_D, eps).to(x.dtype)
    return _own_backward(x.reshape(-1, *size), weight_D, eps).view(x.shape)
