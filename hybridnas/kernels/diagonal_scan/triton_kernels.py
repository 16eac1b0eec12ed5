# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""The scan of a diagonal linear recurrence in Triton.

Letters: B batch, L length, D channels; tiles: BL time steps x BD channels. A program has one batch row and BD channels
and goes through L tile by tile: inside a tile an associative scan, between tiles one carried state. Sums are float32.
Complex numbers are two planes, real and imaginary parts; the second one of a tensor begins ``*_p`` numbers after.
"""

import triton
import triton.language as tl


@triton.jit
def after(a1, x1, a2, x2):
    """Return the step (a2, x2) after (a1, x1) as one."""
    return a2 * a1, a2 * x1 + x2


@triton.jit
def complex_after(ar1, ai1, xr1, xi1, ar2, ai2, xr2, xi2):
    """Return the same of complex steps."""
    return (
        ar2 * ar1 - ai2 * ai1,
        ar2 * ai1 + ai2 * ar1,
        ar2 * xr1 - ai2 * xi1 + xr2,
        ar2 * xi1 + ai2 * xr1 + xi2,
    )


@triton.jit
def tile_at(pointer, i, step, d, inside):
    """Return rows i (BL, 1) and channels d (1, BD) of a tile in float32, zero outside."""
    return tl.load(pointer + (i * step + d), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_of(tile, i, which):
    """Return one row (1, BD) of a tile."""
    return tl.sum(tl.where(i == which, tile, 0.0), 0)[None, :]


@triton.jit
def diagonal_forward(
    x, a, initial, reset, h, L, D, x_p, x_b, x_l, a_p, a_b, a_l, h_p, initial_p,
    COMPLEX: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store h (P, B, L, D)."""
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    d = (pid % blocks) * BD + tl.arange(0, BD)[None, :]
    i, origin = tl.arange(0, BL)[:, None], tl.full((), 0, tl.int64)
    carry, carry_im = tl.zeros((1, BD), tl.float32), tl.zeros((1, BD), tl.float32)
    if initial is not None:
        carry += tl.load(initial + b * D + d, mask=d < D, other=0.0)
        if COMPLEX:
            carry_im += tl.load(initial + initial_p + b * D + d, mask=d < D, other=0.0)
    for tile in range(tl.cdiv(L, BL)):
        first = origin + tile * BL
        inside = (i + first < L) & (d < D)
        x_at, a_at, h_at = x + b * x_b + first * x_l, a + b * a_b + first * a_l, h + (b * L + first) * D
        value, decay = tile_at(x_at, i, x_l, d, inside), tile_at(a_at, i, a_l, d, inside)
        kept = inside
        if reset is not None:
            kept = inside & (tl.load(reset + b * L + first + i, mask=i + first < L, other=0) == 0)
            decay = tl.where(kept, decay, 0.0)
        if COMPLEX:
            value_im = tile_at(x_at + x_p, i, x_l, d, inside)
            decay_im = tl.where(kept, tile_at(a_at + a_p, i, a_l, d, inside), 0.0)
            decay, decay_im, value, value_im = tl.associative_scan((decay, decay_im, value, value_im), 0, complex_after)
            found = decay * carry - decay_im * carry_im + value
            found_im = decay * carry_im + decay_im * carry + value_im
            tl.store(h_at + h_p + (i * D + d), found_im, mask=inside)
            carry_im = row_of(found_im, i, BL - 1)
        else:
            decay, value = tl.associative_scan((decay, value), 0, after)
            found = decay * carry + value
        tl.store(h_at + (i * D + d), found, mask=inside)
        carry = row_of(found, i, BL - 1)


@triton.jit
def diagonal_backward(
    a, initial, reset, h, dh, da, dx, dinitial, L, D, a_p, a_b, a_l, h_p, initial_p, dh_p, dh_b, dh_l,
    COMPLEX: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store da, dx (P, B, L, D) and dinitial (P, B, D).

    The gradient of h_t is dh_t + conj(a_{t+1}) times that of h_{t+1}: the same scan from the end, of decays one step
    further; ``carry`` is the gradient of the state after the tile.
    """
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    d = (pid % blocks) * BD + tl.arange(0, BD)[None, :]
    i, origin = tl.arange(0, BL)[:, None], tl.full((), 0, tl.int64)
    carry, carry_im = tl.zeros((1, BD), tl.float32), tl.zeros((1, BD), tl.float32)
    tiles = tl.cdiv(L, BL)
    for back in range(tiles):
        first = origin + (tiles - 1 - back) * BL
        t = i + first
        inside, follows = (t < L) & (d < D), (t + 1 < L) & (d < D)
        dh_at, at = dh + b * dh_b + first * dh_l, (b * L + first) * D
        a_at = a + b * a_b + (first + 1) * a_l
        before = (t > 0) & inside
        kept = follows
        if reset is not None:
            row = reset + b * L + first + i
            kept = follows & (tl.load(row + 1, mask=t + 1 < L, other=0) == 0)
            before = before & (tl.load(row, mask=t < L, other=0) == 0)
        grad, decay = tile_at(dh_at, i, dh_l, d, inside), tile_at(a_at, i, a_l, d, kept)
        earlier = tile_at(h + at - D, i, D, d, before)
        if initial is not None:
            earlier += tl.load(initial + b * D + d + i * 0, mask=(t == 0) & (d < D), other=0.0)
        if COMPLEX:
            grad_im = tile_at(dh_at + dh_p, i, dh_l, d, inside)
            decay_im = -tile_at(a_at + a_p, i, a_l, d, kept)
            earlier_im = tile_at(h + h_p + at - D, i, D, d, before)
            if initial is not None:
                earlier_im += tl.load(initial + initial_p + b * D + d + i * 0, mask=(t == 0) & (d < D), other=0.0)
            decay, decay_im, grad, grad_im = tl.associative_scan(
                (decay, decay_im, grad, grad_im), 0, complex_after, reverse=True
            )
            found = decay * carry - decay_im * carry_im + grad
            found_im = decay * carry_im + decay_im * carry + grad_im
            tl.store(dx + h_p + at + (i * D + d), found_im, mask=inside)
            tl.store(da + h_p + at + (i * D + d), found_im * earlier - found * earlier_im, mask=inside)
            tl.store(da + at + (i * D + d), found * earlier + found_im * earlier_im, mask=inside)
            carry_im = row_of(found_im, i, 0)
        else:
            decay, grad = tl.associative_scan((decay, grad), 0, after, reverse=True)
            found = decay * carry + grad
            tl.store(da + at + (i * D + d), found * earlier, mask=inside)
        tl.store(dx + at + (i * D + d), found, mask=inside)
        carry = row_of(found, i, 0)
    if initial is not None:  # the first step never begins another document
        decay = tl.load(a + b * a_b + d, mask=d < D, other=0.0).to(tl.float32)
        total = decay * carry
        if COMPLEX:
            decay_im = tl.load(a + a_p + b * a_b + d, mask=d < D, other=0.0).to(tl.float32)
            total += decay_im * carry_im
            tl.store(dinitial + initial_p + b * D + d, decay * carry_im - decay_im * carry, mask=d < D)
        tl.store(dinitial + b * D + d, total, mask=d < D)
