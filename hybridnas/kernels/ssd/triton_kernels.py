# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""State-space duality in Triton, forward and backward.

Matrix products inside chunks, float32 states between them, no atomics.

Letters: B batch, L length, H heads, P channels of a head, G groups, R heads of a group, N state size, C chunks, T
steps of a chunk; tiles: BT steps (T is a multiple), BP >= 16 channels, BN >= 16 states. Inside a chunk, with
l_t = dt_t A, W_ij = exp(l_{j+1} + ... + l_i) for j <= i in one document, else 0, and u_t = dt_t x_t,

    ssd_steps        dt after bias and softplus, and the running sum of l within the chunk
    ssd_scores       C_i . B_j, once for all heads of a group
    ssd_states       sum_t W_Tt u_t B_t^T: the end of every chunk from a zero state, all chunks at once
    ssd_pass_states  the chain over chunks: the state that each one starts from; the backward keeps these
    ssd_outputs      y_i = sum_j W_ij (C_i . B_j) u_j + W_i0 h_start C_i, with D, z

Backward:

    ssd_gate_gradients    dz, and the outputs' gradients before the gate; with z alone
    ssd_states            (of the forward, from the start) dLoss/d(start) of every chunk from its own outputs
    ssd_pass_gradients    the chain from the last chunk to the first: dLoss/d(end) of each
    ssd_inputs_gradients  dx = dt (sum_i W_ij (C_i . B_j) dy_i + W_Tj dend B_j) + D dy, and the direct part of ddt
    ssd_scores_gradients  of C_i . B_j: sum over a group's heads of W_ij (dy_i . u_j)
    ssd_maps_gradients    dC and dB from these and from the states
    ssd_steps_gradients   ddt, dA and dt_bias's, from the gradients of the weights' logarithms

A weight W_ij = exp(l_{j+1} + ... + l_i) with gradient M_ij / W_ij gives M_ij to each l between: the kernels store sums
of M by i and by j, and the last one sums their differences backwards. Both in float64, so that what cancels does, as
behind a step that forgets everything. LINE is the length of such a buffer's (B, H, CT). What several programs add to
goes to partial buffers, so the same inputs give the same bits.

The running sum is taken in float64 and kept as two float32 numbers whose difference is exact: one float32 sum would
lose the digits of small steps behind large ones. DOT is the dtype of the matrix products' operands: that of
half-precision inputs, as mamba-ssm does, float32 where an interpreter runs, whose bfloat16 is silently wrong. Products
are summed in float32 always. 64-bit offsets for batch, chunk and head, 32-bit ones within.
"""

import triton
import triton.language as tl

from hybridnas.kernels.selective_scan.triton_kernels import exp, sigmoid, softplus


@triton.jit
def place(CHUNKS, H):
    """Return batch, chunk and head (64 bits) of this program, whose second axis is the tile within them."""
    pid = tl.program_id(0)
    return (pid // H // CHUNKS).to(tl.int64), ((pid // H) % CHUNKS).to(tl.int64), (pid % H).to(tl.int64)


@triton.jit
def matrix(pointer, rows, columns, step, row_limit, column_limit):
    """Return pointer[rows * step + columns], zero outside; rows and columns broadcast, in either order."""
    inside = (rows < row_limit) & (columns < column_limit)
    return tl.load(pointer + rows * step + columns, mask=inside, other=0.0)


@triton.jit
def sums_between(hi, lo, i, j):
    """Return l_{j+1} + ... + l_i from the running sums of a chunk at ``hi`` and ``lo``, to float32's last digit."""
    return (tl.load(hi + i) - tl.load(hi + j)) + (tl.load(lo + i) - tl.load(lo + j))


@triton.jit
def weights(hi, lo, document, i, j):
    """Return W_ij for steps i and j of a chunk that broadcast; zero for j > i and across documents."""
    kept = j <= i
    if document is not None:
        kept = kept & (tl.load(document + i) == tl.load(document + j))
    return tl.where(kept, exp(tl.where(kept, sums_between(hi, lo, i, j), 0.0)), 0.0)


@triton.jit
def document_before(document, c):
    """Return the document of the step before this chunk, whose first step is at ``document``; 0 before the first."""
    return tl.load(document - 1, mask=c > 0, other=0)


@triton.jit
def weights_from_start(hi, lo, document, i, c):
    """Return what is left at steps i of the state that the chunk starts from."""
    kept = exp(tl.load(hi + i) + tl.load(lo + i))
    if document is not None:
        kept = tl.where(tl.load(document + i) == document_before(document, c), kept, 0.0)
    return kept


@triton.jit
def weights_to_end(hi, lo, document, j, T: tl.constexpr):
    """Return what is left of steps j at the end of the chunk."""
    kept = exp(sums_between(hi, lo, T - 1, j))
    if document is not None:
        kept = tl.where(tl.load(document + j) == tl.load(document + T - 1), kept, 0.0)
    return kept


@triton.jit
def weight_through(hi, lo, document, c, T: tl.constexpr):
    """Return what is left at the end of a chunk of the state that it starts from."""
    kept = exp(tl.load(hi + T - 1) + tl.load(lo + T - 1))
    if document is not None:
        kept = tl.where(tl.load(document + T - 1) == document_before(document, c), kept, 0.0)
    return kept


@triton.jit
def documents_of(document, b, c, CHUNKS, T: tl.constexpr):
    """Return where the documents (B, CT) of one chunk lie, or None."""
    if document is not None:
        return document + (b * CHUNKS + c) * T
    else:
        return document


@triton.jit
def ssd_steps(
    dt, A, bias, steps, hi, lo, L, H, CHUNKS, dt_b, dt_l, SOFTPLUS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """Store dt, 0 past L, and the running sums of dt A, each (B, H, CT)."""
    blocks = tl.cdiv(H, BH)
    pid = tl.program_id(0)
    c = ((pid // blocks) % CHUNKS).to(tl.int64)
    b = (pid // blocks // CHUNKS).to(tl.int64)
    h, t = (pid % blocks) * BH + tl.arange(0, BH)[None, :], tl.arange(0, T)[:, None]
    h_in, start = h < H, c * T
    value = tl.load(dt + b * dt_b + start * dt_l + (t * dt_l + h), mask=(start + t < L) & h_in, other=0.0)
    value = value.to(tl.float32)
    if bias is not None:
        value += tl.load(bias + h, mask=h_in, other=0.0).to(tl.float32)
    if SOFTPLUS:
        value = softplus(value)
    value = tl.where((start + t < L) & h_in, value, 0.0)
    a = tl.load(A + h, mask=h_in, other=0.0).to(tl.float32)
    total = tl.cumsum(value.to(tl.float64) * a.to(tl.float64), 0)
    high = total.to(tl.float32)
    at = (b * H + h) * (CHUNKS * T) + start + t
    tl.store(steps + at, value, mask=h_in)
    tl.store(hi + at, high, mask=h_in)
    tl.store(lo + at, (total - high.to(tl.float64)).to(tl.float32), mask=h_in)


@triton.jit
def ssd_scores(
    B, C, scores, L, G, N, CHUNKS, B_b, B_l, C_b, C_l,
    T: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store C_i . B_j of every chunk and group, scores (B, C, G, T, T), where j's tile is not after i's."""
    b, c, g = place(CHUNKS, G)
    tile: tl.constexpr = T // BT
    i_tile, j_tile = tl.program_id(1) // tile, tl.program_id(1) % tile
    if j_tile <= i_tile:
        i, j = i_tile * BT + tl.arange(0, BT)[:, None], j_tile * BT + tl.arange(0, BT)[None, :]
        left = (L - c * T).to(tl.int32)
        B_at, C_at = B + b * B_b + c * T * B_l + g * N, C + b * C_b + c * T * C_l + g * N
        total = tl.zeros((BT, BT), tl.float32)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            rows = matrix(C_at, i, n[None, :], C_l, left, N).to(DOT)
            columns = matrix(B_at, j, n[:, None], B_l, left, N).to(DOT)
            total = tl.dot(rows, columns, total, input_precision=PRECISION)
        tl.store(scores + ((b * CHUNKS + c) * G + g) * (T * T) + (i * T + j), total)


@triton.jit
def ssd_states(
    x, B, steps, hi, lo, document, states, L, H, R, P, N, CHUNKS, x_b, x_l, B_b, B_l,
    START: tl.constexpr, T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store sum_t w_t x_t B_t^T of every chunk and head, states (B, C, H, P, N).

    w_t is dt_t times the weight to the end; with START it is the weight from the start, which makes of the outputs'
    gradients (in x) and C (in B) the gradient of the state that the chunk starts from.
    """
    b, c, h = place(CHUNKS, H)
    across = tl.cdiv(N, BN)
    p, n = (tl.program_id(1) // across) * BP + tl.arange(0, BP), (tl.program_id(1) % across) * BN + tl.arange(0, BN)
    line, documents = (b * H + h) * (CHUNKS * T) + c * T, documents_of(document, b, c, CHUNKS, T)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    x_at, B_at = x + b * x_b + c * T * x_l + h * P, B + b * B_b + c * T * B_l + (h // R) * N
    total = tl.zeros((BP, BN), tl.float32)
    for t0 in range(0, left, BT):
        t = t0 + tl.arange(0, BT)
        if START:
            w = weights_from_start(hi + line, lo + line, documents, t, c)
        else:
            w = weights_to_end(hi + line, lo + line, documents, t, T) * tl.load(steps + line + t)
        value = matrix(x_at, t[None, :], p[:, None], x_l, left, P).to(tl.float32) * w[None, :]
        total = tl.dot(
            value.to(DOT), matrix(B_at, t[:, None], n[None, :], B_l, left, N).to(DOT), total, input_precision=PRECISION
        )
    mask = (p < P)[:, None] & (n < N)[None, :]
    tl.store(states + ((b * CHUNKS + c) * H + h) * P * N + (p[:, None] * N + n[None, :]), total, mask=mask)


@triton.jit
def ssd_pass_states(
    initial, states, final, hi, lo, document, H, NUMBERS, CHUNKS, T: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Replace the chunks' own end states by the states they start from, and store the last end, final (B, H, P, N)."""
    blocks = tl.cdiv(NUMBERS, BLOCK)
    pid = tl.program_id(0)
    head = (pid // blocks).to(tl.int64)
    b, h = head // H, head % H
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < NUMBERS
    state = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        state = tl.load(initial + head * NUMBERS + i, mask=inside, other=0.0).to(tl.float32)
    for c in range(CHUNKS):
        line, at = (head * CHUNKS + c) * T, ((b * CHUNKS + c) * H + h) * NUMBERS + i
        own = tl.load(states + at, mask=inside, other=0.0)
        tl.store(states + at, state, mask=inside)
        through = weight_through(hi + line, lo + line, documents_of(document, b, c, CHUNKS, T), c, T)
        state = through * state + own
    tl.store(final + head * NUMBERS + i, state, mask=inside)


@triton.jit
def from_states(
    narrow_at, states_at, t, p, left, P, N, step,
    BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return sum_n narrow[t, n] state[p, n], (BT, BP)."""
    total = tl.zeros((BT, BP), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        rows = matrix(narrow_at, t[:, None], n[None, :], step, left, N).to(DOT)
        columns = matrix(states_at, p[None, :], n[:, None], N, P, N).to(DOT)
        total = tl.dot(rows, columns, total, input_precision=PRECISION)
    return total


@triton.jit
def ssd_outputs(
    x, C, steps, hi, lo, document, scores, states, skip, z, y, ungated,
    L, H, R, P, N, CHUNKS, x_b, x_l, C_b, C_l, z_b, z_l,
    T: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store y (B, L, H, P), and with z also y before the gate, which the backward needs."""
    b, c, h = place(CHUNKS, H)
    across = tl.cdiv(P, BP)
    i_tile, p = tl.program_id(1) // across, (tl.program_id(1) % across) * BP + tl.arange(0, BP)
    i = i_tile * BT + tl.arange(0, BT)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line, documents = (b * H + h) * (CHUNKS * T) + c * T, documents_of(document, b, c, CHUNKS, T)
    x_at, C_at = x + b * x_b + c * T * x_l + h * P, C + b * C_b + c * T * C_l + (h // R) * N
    states_at = states + ((b * CHUNKS + c) * H + h) * P * N
    total = from_states(C_at, states_at, i, p, left, P, N, C_l, BT, BP, BN, DOT, PRECISION)
    total *= weights_from_start(hi + line, lo + line, documents, i, c)[:, None]
    scores_at = scores + ((b * CHUNKS + c) * (H // R) + h // R) * (T * T)
    for j_tile in range(i_tile + 1):
        j = j_tile * BT + tl.arange(0, BT)
        mixed = weights(hi + line, lo + line, documents, i[:, None], j[None, :])
        mixed *= tl.load(scores_at + i[:, None] * T + j[None, :]) * tl.load(steps + line + j)[None, :]
        value = matrix(x_at, j[:, None], p[None, :], x_l, left, P)
        total = tl.dot(mixed.to(DOT), value.to(DOT), total, input_precision=PRECISION)
    inside = (i < left)[:, None] & (p < P)[None, :]
    if skip is not None:
        through = tl.load(skip + h).to(tl.float32)
        total += through * matrix(x_at, i[:, None], p[None, :], x_l, left, P).to(tl.float32)
    at = (b * L + c * T) * H * P + h * P + (i[:, None] * (H * P) + p[None, :])
    if z is not None:
        tl.store(ungated + at, total.to(ungated.dtype.element_ty), mask=inside)
        gate = tl.load(z + b * z_b + c * T * z_l + h * P + (i[:, None] * z_l + p[None, :]), mask=inside, other=0.0)
        gate = gate.to(tl.float32)
        total *= gate * sigmoid(gate)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


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
