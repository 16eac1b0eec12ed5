"""The norms on a GPU: the host's side of ``triton_kernels.py``, as a custom operator for autograd, compile, export.

Imports triton at its top: imported only where it runs. Shapes: N rows, D features, P programs of the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build.arguments import rows
from hybridnas.kernels._inputs import state_dtype
from hybridnas.kernels._register import refuse_second_derivative, register_op
from hybridnas.kernels._triton.launch import Tile, launch
from hybridnas.kernels._triton.shapes import NORM_ROWS as ROWS
from hybridnas.kernels._triton.shapes import power_of_two
from hybridnas.kernels.rmsnorm import triton_kernels as kernels

_Optional = Tensor | None


def tiles(features: int) -> list[Tile]:
    """Return the one tile for rows of this length: a row is one block."""
    block = max(32, power_of_two(features))
    return [Tile.of(min(16, max(1, block // 256)), BLOCK=block)]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, eps, centered = args
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = _outputs(*args)
    if x.shape[0]:
        _launch_forward(x, residual, weight, bias, eps, centered, outputs)
    return outputs


def _launch_forward(
    x: Tensor,
    residual: _Optional,
    weight: _Optional,
    bias: _Optional,
    eps: float,
    centered: bool,
    outputs: tuple[Tensor, ...],
) -> None:
    (count, features), (y_ND, total_ND, mean_N, rstd_N) = x.shape, outputs
    x, residual = rows(x), None if residual is None else rows(residual)
    launch(
        kernels.norm_forward, lambda _: count, tiles(features), (), x.device,
        x=x, residual=residual, weight=_packed(weight), bias=_packed(bias), y=y_ND,
        total=None if residual is None else total_ND, mean=mean_N if centered else None, rstd=rstd_N,
        D=features, x_row=x.stride(0), residual_row=0 if residual is None else residual.stride(0),
        EPS=eps, CENTERED=centered,
    )  # fmt: skip


def _outputs(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, _, _, _, centered = args
    rstd_N = x.new_empty(x.shape[0], dtype=state_dtype(x))
    total_ND = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total_ND, rstd_N.new_empty(x.shape[0] if centered else 0), rstd_N


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dy, dtotal, total, weight, biased, mean_N, rstd_N, centered = args
    count, features = total.shape
    dx_ND, programs = total.new_empty(total.shape), -(-count // ROWS)
    dweight_PD = None if weight is None else rstd_N.new_empty(programs, features)
    dbias_PD = rstd_N.new_empty(programs, features) if biased else None
    if count:
        outputs = dx_ND, dweight_PD, dbias_PD
        _launch_backward(dy, dtotal, total, weight, mean_N, rstd_N, centered, outputs)
    none = rstd_N.new_empty(0)
    return dx_ND, *(none.clone() if part is None else part.sum(0) for part in (dweight_PD, dbias_PD))


def _launch_backward(
    dy: Tensor,
    dtotal: _Optional,
    total: Tensor,
    weight: _Optional,
    mean_N: Tensor,
    rstd_N: Tensor,
    centered: bool,
    outputs: tuple[Tensor, _Optional, _Optional],
) -> None:
    (count, features), (dx_ND, dweight_PD, dbias_PD) = total.shape, outputs
    dy, total, dtotal = rows(dy), rows(total), None if dtotal is None else rows(dtotal)
    launch(
        kernels.norm_backward, lambda _: -(-count // ROWS), tiles(features), (), dy.device,
        dy=dy, dtotal=dtotal, total=total, weight=_packed(weight), mean=mean_N if centered else None,
        rstd=rstd_N, dx=dx_ND, dweight=dweight_PD, dbias=dbias_PD, N=count, D=features, dy_row=dy.stride(0),
        dtotal_row=0 if dtotal is None else dtotal.stride(0), total_row=total.stride(0),
        CENTERED=centered, ROWS=ROWS,
    )  # fmt: skip


def _fake_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, total, weight, biased, _, rstd_N, _ = args
    features = total.shape[1]
    sums = rstd_N.new_empty(0 if weight is None else features), rstd_N.new_empty(features if biased else 0)
    return total.new_empty(total.shape), *sums


def _packed(values_D: _Optional) -> _Optional:
    return None if values_D is None else values_D.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.centered = inputs
    _, total_ND, mean_N, rstd_N = output
    ctx.mark_non_differentiable(mean_N, rstd_N, *((total_ND,) if residual is None else ()))
    ctx.set_materialize_grads(False)
    ctx.bias_dtype, ctx.fused = None if bias is None else bias.dtype, residual is not None
    ctx.save_for_backward(x if residual is None else total_ND, weight, mean_N, rstd_N)


def _backpropagate(ctx: Any, dy: _Optional, dtotal: _Optional, *_: Any) -> tuple[_Optional, ...]:
    total, weight, mean_N, rstd_N = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(total)
    dx, dweight, dbias = torch.ops.hybridnas.norm_backward(
        dy, dtotal if ctx.fused else None, total, weight, ctx.bias_dtype is not None, mean_N, rstd_N, ctx.centered
    )
    return (
        dx,
        dx if ctx.fused else None,
        None if weight is None else dweight.to(weight.dtype),
        None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype),
        None,
        None,
    )


# the backward reads the sum alone, not both of its terms, which the general helper would keep
register_op(
    "norm",
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool centered",
    4,
    run=_forward,
    fake=_outputs,
)
register_op(
    "norm_backward",
    "Tensor dy, Tensor? dtotal, Tensor total, Tensor? weight, bool biased, Tensor mean, Tensor rstd, bool centered",
    3,
    run=_backward,
    fake=_fake_gradients,
)
torch.library.register_autograd("hybridnas::norm", _backpropagate, setup_context=_setup)
refuse_second_derivative("norm")


def norm_triton(
    x_ND: Tensor, residual_ND: _Optional, weight_D: _Optional, bias_D: _Optional, eps: float, *, centered: bool
) -> tuple[Tensor, Tensor]:
    """Return y (N, D) and x + residual (x itself without one), both in x's dtype."""
    y_ND, total_ND, _, _ = torch.ops.hybridnas.norm(x_ND, residual_ND, weight_D, bias_D, eps, centered)
    return y_ND, x_ND if residual_ND is None else total_ND
