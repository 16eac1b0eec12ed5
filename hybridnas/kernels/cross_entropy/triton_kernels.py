# mypy: ignore-errors
# Triton reads the source of this function; Python's types do not describe it.
"""Losses of rows of logits, and their gradients, in Triton: one program a row, two passes over it, nothing kept.

Letters: B columns of one block, V vocabulary. The first pass finds the normaliser while it reads (arXiv 1805.02867);
the second writes the gradient. Every load is widened before arithmetic: bfloat16 arithmetic is rounded on a GPU and
silently wrong in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(
    logits,
    targets,
    scale,
    out,
    loss,
    logsumexp,
    V,
    logits_row,
    out_row,
    GRADIENT: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wide = loss.dtype.element_ty
    logits += row * logits_row
    columns = tl.arange(0, BLOCK)
    # a maximum and a sum per lane: one exchange between lanes at the end, not one per block
    peak_B = tl.full([BLOCK], float("-inf"), dtype=wide)
    sum_B = tl.zeros([BLOCK], dtype=wide)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        x_B = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(wide)
        higher_B = tl.maximum(peak_B, x_B)
        base_B = tl.where(higher_B == float("-inf"), 0.0, higher_B)  # no infinity minus infinity
        sum_B = sum_B * tl.exp(peak_B - base_B) + tl.exp(x_B - base_B)
        peak_B = higher_B
    peak = tl.max(peak_B, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    normaliser = peak + tl.log(tl.sum(sum_B * tl.exp(peak_B - peak), 0))
    target = tl.load(targets + row)
    chosen = tl.load(logits + target).to(wide)
    value = normaliser - chosen
    if Z_LOSS != 0.0:
        value += Z_LOSS * normaliser * normaliser
    tl.store(loss + row, value)
    tl.store(logsumexp + row, normaliser)
    if GRADIENT:
        out += row * out_row
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x_B = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(wide)
            gradient_B = tl.exp(x_B - normaliser)
            if Z_LOSS != 0.0:
                gradient_B *= 1.0 + 2.0 * Z_LOSS * normaliser
            gradient_B = tl.where(start + columns == target, gradient_B - 1.0, gradient_B)
            if scale is not None:
                gradient_B *= tl.load(scale + row).to(wide)
            tl.store(out + start + columns, gradient_B.to(out.dtype.element_ty), mask=inside)
