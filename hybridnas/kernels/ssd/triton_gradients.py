# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""State-space duality in Triton, backward; letters, weights and the forward: see ``triton_kernels.py``.

    ssd_gate_gradients    dz, and the outputs' gradients before the gate; with z alone
    ssd_states            (of the forward, from the start) dLoss/d(start) of every chunk from its own outputs
    ssd_pass_gradients    the chain from the last chunk to the first: dLoss/d(end) of each
    ssd_inputs_gradients  dx = dt (sum_i W_ij (C_i . B_j) dy_i + W_Tj dend B_j) + D dy, and the direct part of ddt
    ssd_scores_gradients  of C_i . B_j: sum over a group's heads of W_ij (dy_i . u_j)
    ssd_maps_gradients    dC and dB from these and from the states
    ssd_steps_gradients   ddt, dA and dt_bias's, from the gradients of the weights' logarithms

A weight W_ij = exp(l_{j+1} + ... + l_i) with gradient M_ij / W_ij gives M_ij to each l between: the kernels store sums
of M by i and by j, and the last one sums their differences backwards. Both in float64, so that what cancels does, as
behind a step that forgets everything. LINE is the length of such a buffer's (B, H, CT). No atomics: what several
programs add to goes to partial buffers, so the same inputs give the same bits.
"""

import triton
import triton.language as tl

from hybridnas.kernels.selective_scan.triton_kernels import sigmoid
from hybridnas.kernels.ssd.triton_kernels import (
    documents_of,
    from_states,
    matrix,
    place,
    weight_through,
    weights,
    weights_from_start,
    weights_to_end,
)


@triton.jit
def ssd_gate_gradients(dy, z, ungated, dz, g, L, D, dy_b, dy_l, z_b, z_l, BLOCK: tl.constexpr):
    """Store dz and g = dy silu(z), both (B, L, D); one program a step and BLOCK channels."""
    blocks = tl.cdiv(D, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    b, t = row // L, row % L
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    given = tl.load(dy + b * dy_b + t * dy_l + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + b * z_b + t * z_l + d, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(ungated + row * D + d, mask=inside, other=0.0).to(tl.float32)
    open_ = sigmoid(gate)
    slope = open_ * (1.0 + gate * (1.0 - open_))
    tl.store(dz + row * D + d, (given * before * slope).to(dz.dtype.element_ty), mask=inside)
    tl.store(g + row * D + d, (given * gate * open_).to(g.dtype.element_ty), mask=inside)


@triton.jit
def ssd_pass_gradients(
    dfinal, states, carry, dinitial, through, hi, lo, document, H, NUMBERS, CHUNKS,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace dLoss/d(start) from own outputs by dLoss/d(end), carry (B, C, H, P, N); store dinitial (B, H, P, N).

    ``through`` (blocks, B, H, C) gets the sums of dLoss/d(log of what passes through a chunk).
    """
    blocks = tl.cdiv(NUMBERS, BLOCK)
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // H, head % H
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < NUMBERS
    heads = tl.num_programs(0) // blocks
    through_at = through + ((pid % blocks).to(tl.int64) * heads + head) * CHUNKS
    e = tl.zeros((BLOCK,), tl.float32)
    if dfinal is not None:
        e = tl.load(dfinal + head * NUMBERS + i, mask=inside, other=0.0).to(tl.float32)
    for back in range(CHUNKS):
        c = CHUNKS - 1 - back
        line, at = (head * CHUNKS + c) * T, ((b * CHUNKS + c) * H + h) * NUMBERS + i
        own = tl.load(carry + at, mask=inside, other=0.0)
        start = tl.load(states + at, mask=inside, other=0.0)
        tl.store(carry + at, e, mask=inside)
        kept = weight_through(hi + line, lo + line, documents_of(document, b, c, CHUNKS, T), c, T)
        tl.store(through_at + c, kept * tl.sum(e * start, 0))
        e = kept * e + own
    tl.store(dinitial + head * NUMBERS + i, e, mask=inside)


@triton.jit
def ssd_inputs_gradients(
    x, B, g, steps, hi, lo, document, scores, carry, skip, dx, direct, ending, dskip,
    L, H, R, P, N, CHUNKS, x_b, x_l, B_b, B_l, g_b, g_l,
    T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dx (B, L, H, P); by step, (B, H, CT), the direct part of ddt and dLoss/d(log of the weight to the end).

    ``dskip`` (B, C, tiles, H) gets partial sums of D's gradient.
    """
    b, c, h = place(CHUNKS, H)
    j_tile = tl.program_id(1)
    j = j_tile * BT + tl.arange(0, BT)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line, documents = (b * H + h) * (CHUNKS * T) + c * T, documents_of(document, b, c, CHUNKS, T)
    x_at, B_at = x + b * x_b + c * T * x_l + h * P, B + b * B_b + c * T * B_l + (h // R) * N
    g_at, dx_at = g + b * g_b + c * T * g_l + h * P, dx + (b * L + c * T) * H * P + h * P
    carry_at = carry + ((b * CHUNKS + c) * H + h) * P * N
    scores_at = scores + ((b * CHUNKS + c) * (H // R) + h // R) * (T * T)
    dt, to_end = tl.load(steps + line + j), weights_to_end(hi + line, lo + line, documents, j, T)
    through = 0.0
    if skip is not None:
        through = tl.load(skip + h).to(tl.float32)
    sum_direct, sum_ending = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    sum_skip = tl.zeros((BT,), tl.float32)
    for p0 in range(0, P, BP):
        p = p0 + tl.arange(0, BP)
        total = from_states(B_at, carry_at, j, p, left, P, N, B_l, BT, BP, BN, DOT, PRECISION) * to_end[:, None]
        value = matrix(x_at, j[:, None], p[None, :], x_l, left, P).to(tl.float32)
        sum_ending += tl.sum(value * total, 1)
        for i_tile in range(j_tile, tl.cdiv(left, BT)):
            i = i_tile * BT + tl.arange(0, BT)
            mixed = weights(hi + line, lo + line, documents, i[None, :], j[:, None])
            mixed *= tl.load(scores_at + i[None, :] * T + j[:, None])
            later = matrix(g_at, i[:, None], p[None, :], g_l, left, P)
            total = tl.dot(mixed.to(DOT), later.to(DOT), total, input_precision=PRECISION)
        sum_direct += tl.sum(value * total, 1)
        here = matrix(g_at, j[:, None], p[None, :], g_l, left, P).to(tl.float32)
        sum_skip += tl.sum(value * here, 1)
        inside = (j < left)[:, None] & (p < P)[None, :]
        at = j[:, None] * (H * P) + p[None, :]
        tl.store(dx_at + at, (dt[:, None] * total + through * here).to(dx.dtype.element_ty), mask=inside)
    tl.store(direct + line + j, sum_direct)
    tl.store(ending + line + j, sum_ending * dt)
    tl.store(dskip + ((b * CHUNKS + c) * (T // BT) + j_tile) * H + h, tl.sum(sum_skip, 0))


@triton.jit
def ssd_scores_gradients(
    x, g, steps, hi, lo, document, scores, dscores, by_i, by_j, L, H, G, R, P, LINE, CHUNKS, x_b, x_l, g_b, g_l,
    T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dLoss/d(C_i . B_j), dscores (B, C, G, T, T), and the sums of M_ij by i and by j, (tiles, B, H, CT)."""
    b, c, group = place(CHUNKS, G)
    tiles: tl.constexpr = T // BT
    i_tile, j_tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    if j_tile <= i_tile:
        i, j = i_tile * BT + tl.arange(0, BT), j_tile * BT + tl.arange(0, BT)
        left = tl.minimum(L - c * T, T).to(tl.int32)
        documents = documents_of(document, b, c, CHUNKS, T)
        ij = ((b * CHUNKS + c) * G + group) * (T * T) + (i[:, None] * T + j[None, :])
        total = tl.zeros((BT, BT), tl.float32)
        for r in range(R):
            h = group * R + r
            line = (b * H + h) * (CHUNKS * T) + c * T
            x_at, g_at = x + b * x_b + c * T * x_l + h * P, g + b * g_b + c * T * g_l + h * P
            products = tl.zeros((BT, BT), tl.float32)
            for p0 in range(0, P, BP):
                p = p0 + tl.arange(0, BP)
                rows = matrix(g_at, i[:, None], p[None, :], g_l, left, P).to(DOT)
                columns = matrix(x_at, j[None, :], p[:, None], x_l, left, P).to(DOT)
                products = tl.dot(rows, columns, products, input_precision=PRECISION)
            products *= weights(hi + line, lo + line, documents, i[:, None], j[None, :])
            products *= tl.load(steps + line + j)[None, :]
            total += products
            # the diagonal has no step between i and j
            products = tl.where(j[None, :] < i[:, None], products * tl.load(scores + ij), 0.0)
            exact = products.to(tl.float64)
            tl.store(by_i + j_tile.to(tl.int64) * LINE + line + i, tl.sum(exact, 1))
            tl.store(by_j + i_tile.to(tl.int64) * LINE + line + j, tl.sum(exact, 0))
        tl.store(dscores + ij, total)


@triton.jit
def ssd_maps_gradients(
    v, other, own, states, steps, hi, lo, document, dscores, out, starting,
    L, H, G, R, P, N, LINE, CHUNKS, v_b, v_l, other_b, other_l, own_b, own_l,
    LATER: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dC, or with LATER dB, in out (B, L, G, N).

    dC: v is the outputs' gradient, other is B, own is C, states are the chunks' starts, and ``starting``
    (N / BN, B, H, CT) gets dLoss/d(log of the weight from the start). dB: v is x, other is C, states are
    dLoss/d(end of chunk).
    """
    b, c, group = place(CHUNKS, G)
    across = tl.cdiv(N, BN)
    tile, block = tl.program_id(1) // across, tl.program_id(1) % across
    t, n = tile * BT + tl.arange(0, BT), block * BN + tl.arange(0, BN)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    documents = documents_of(document, b, c, CHUNKS, T)
    total = tl.zeros((BT, BN), tl.float32)
    mine = total
    if not LATER:
        own_at = own + b * own_b + c * T * own_l + group * N
        mine = matrix(own_at, t[:, None], n[None, :], own_l, left, N).to(tl.float32)
    for r in range(R):
        h = group * R + r
        line = (b * H + h) * (CHUNKS * T) + c * T
        v_at, states_at = v + b * v_b + c * T * v_l + h * P, states + ((b * CHUNKS + c) * H + h) * P * N
        reached = tl.zeros((BT, BN), tl.float32)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, BP)
            rows = matrix(v_at, t[:, None], p[None, :], v_l, left, P).to(DOT)
            columns = matrix(states_at, p[:, None], n[None, :], N, P, N).to(DOT)
            reached = tl.dot(rows, columns, reached, input_precision=PRECISION)
        if LATER:
            w = weights_to_end(hi + line, lo + line, documents, t, T) * tl.load(steps + line + t)
            total += reached * w[:, None]
        else:
            reached *= weights_from_start(hi + line, lo + line, documents, t, c)[:, None]
            total += reached
            at = block.to(tl.int64) * LINE + line + t
            tl.store(starting + at, tl.sum(reached * mine, 1))
    other_at, at = other + b * other_b + c * T * other_l + group * N, ((b * CHUNKS + c) * G + group) * (T * T)
    for k in range(tile if LATER else 0, tl.cdiv(left, BT) if LATER else tile + 1):
        s = k * BT + tl.arange(0, BT)
        ij = s[None, :] * T + t[:, None] if LATER else t[:, None] * T + s[None, :]
        columns = matrix(other_at, s[:, None], n[None, :], other_l, left, N).to(DOT)
        total = tl.dot(tl.load(dscores + at + ij).to(DOT), columns, total, input_precision=PRECISION)
    place_ = ((b * L + c * T) * G + group) * N + (t[:, None] * (G * N) + n[None, :])
    tl.store(out + place_, total.to(out.dtype.element_ty), mask=(t < left)[:, None] & (n < N)[None, :])


@triton.jit
def ssd_steps_gradients(
    dt, A, bias, steps, direct, ending, by_i, by_j, starting, through, ddt, dA, dbias,
    L, H, LINE, CHUNKS, BLOCKS, ACROSS, dt_b, dt_l,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Store ddt (B, L, H) and partial sums dA, dbias (B, C, H); ACROSS and BLOCKS count ``starting``, ``through``."""
    blocks = tl.cdiv(H, BH)
    pid = tl.program_id(0)
    c = ((pid // blocks) % CHUNKS).to(tl.int64)
    b = (pid // blocks // CHUNKS).to(tl.int64)
    h, t = (pid % blocks) * BH + tl.arange(0, BH)[None, :], tl.arange(0, T)[:, None]
    h_in, start = h < H, c * T
    all_in = h_in & (t < T)
    at = (b * H + h) * (CHUNKS * T) + start + t
    of_end = tl.load(ending + at, mask=all_in, other=0.0).to(tl.float64)
    total = -of_end
    for k in tl.static_range(T // BT):
        total += tl.load(by_i + at, mask=all_in & (t >= k * BT), other=0.0)
        total -= tl.load(by_j + at, mask=all_in & (t < (k + 1) * BT), other=0.0)
        by_i, by_j = by_i + LINE, by_j + LINE  # a product could pass 32 bits
    for _ in range(ACROSS):
        total += tl.load(starting + at, mask=all_in, other=0.0).to(tl.float64)
        starting += LINE
    last = tl.sum(of_end, 0)[None, :]
    for _ in range(BLOCKS):
        last += tl.load(through + (b * H + h) * CHUNKS + c, mask=h_in, other=0.0).to(tl.float64)
        through += LINE // T
    total += tl.where(t == T - 1, last, 0.0)
    log = tl.cumsum(total, 0, reverse=True).to(tl.float32)
    a = tl.load(A + h, mask=h_in, other=0.0).to(tl.float32)
    gradient = tl.load(direct + at, mask=all_in, other=0.0) + a * log
    if SOFTPLUS:
        inside = (start + t < L) & h_in
        raw = tl.load(dt + b * dt_b + start * dt_l + (t * dt_l + h), mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + h, mask=h_in, other=0.0).to(tl.float32)
        gradient *= sigmoid(raw)
    gradient = tl.where(start + t < L, gradient, 0.0)
    tl.store(ddt + (b * L + start + t) * H + h, gradient.to(ddt.dtype.element_ty), mask=(start + t < L) & h_in)
    sums, size = (b * CHUNKS + c) * H + h, tl.load(steps + at, mask=all_in, other=0.0)
    tl.store(dA + sums, tl.sum(size * log, 0)[None, :], mask=h_in)
    tl.store(dbias + sums, tl.sum(gradient, 0)[None, :], mask=h_in)
