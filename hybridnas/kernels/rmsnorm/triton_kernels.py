# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""RMSNorm and LayerNorm in Triton, forward and backward, the residual's addition fused; float32 statistics.

Letters: D features, all of a row in one block; a program of the backward takes ROWS rows one after another and keeps
its share of the weight's gradient in registers, so nothing is added atomically and results never change. Every load
is widened before arithmetic: bfloat16 arithmetic is rounded on a GPU and silently wrong in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def norm_forward(
    x, residual, weight, bias, y, total, mean, rstd, D, x_row, residual_row,
    EPS: tl.constexpr, CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wide = rstd.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x_D = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(wide)
    if residual is not None:
        x_D += tl.load(residual + row * residual_row + columns, mask=inside, other=0.0).to(wide)
        stored_D = x_D.to(total.dtype.element_ty)
        tl.store(total + row * D + columns, stored_D, mask=inside)
        x_D = stored_D.to(wide)  # the norm is that of what the next layers and the backward read
    if CENTERED:
        center = tl.sum(x_D, 0) / D
        tl.store(mean + row, center)
        x_D = tl.where(inside, x_D - center, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x_D * x_D, 0) / D + EPS)
    tl.store(rstd + row, scale)
    x_D *= scale
    if weight is not None:
        x_D *= tl.load(weight + columns, mask=inside, other=0.0).to(wide)
    if bias is not None:
        x_D += tl.load(bias + columns, mask=inside, other=0.0).to(wide)
    tl.store(y + row * D + columns, x_D.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    dy, dtotal, total, weight, mean, rstd, dx, dweight, dbias, N, D, dy_row, dtotal_row, total_row,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    wide = rstd.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    dweight_D = tl.zeros([BLOCK], dtype=wide)
    dbias_D = tl.zeros([BLOCK], dtype=wide)
    first = program * ROWS
    for row in range(first, tl.minimum(first + ROWS, N)):
        x_D = tl.load(total + row * total_row + columns, mask=inside, other=0.0).to(wide)
        dy_D = tl.load(dy + row * dy_row + columns, mask=inside, other=0.0).to(wide)
        scale = tl.load(rstd + row)
        if CENTERED:
            x_D = tl.where(inside, x_D - tl.load(mean + row), 0.0)
        x_D *= scale
        dweight_D += dy_D * x_D
        dbias_D += dy_D
        if weight is not None:
            dy_D *= tl.load(weight + columns, mask=inside, other=0.0).to(wide)
        dx_D = dy_D - x_D * (tl.sum(dy_D * x_D, 0) / D)
        if CENTERED:
            dx_D -= tl.sum(dy_D, 0) / D
        dx_D *= scale
        if dtotal is not None:
            dx_D += tl.load(dtotal + row * dtotal_row + columns, mask=inside, other=0.0).to(wide)
        tl.store(dx + row * D + columns, dx_D.to(dx.dtype.element_ty), mask=inside)
    if dweight is not None:
        tl.store(dweight + program * D + columns, dweight_D, mask=inside)
    if dbias is not None:
        tl.store(dbias + program * D + columns, dbias_D, mask=inside)
