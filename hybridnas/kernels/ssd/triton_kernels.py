# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""State-space duality in Triton, forward: matrix products inside chunks, float32 states between them, no atomics.

Letters: B batch, L length, H heads, P channels of a head, G groups, R heads of a group, N state size, C chunks, T
steps of a chunk; tiles: BT steps (T is a multiple), BP >= 16 channels, BN >= 16 states. Inside a chunk, with
l_t = dt_t A, W_ij = exp(l_{j+1} + ... + l_i) for j <= i in one document, else 0, and u_t = dt_t x_t,

    ssd_steps        dt after bias and softplus, and the running sum of l within the chunk
    ssd_scores       C_i . B_j, once for all heads of a group
    ssd_states       sum_t W_Tt u_t B_t^T: the end of every chunk from a zero state, all chunks at once
    ssd_pass_states  the chain over chunks: the state that each one starts from; the backward keeps these
    ssd_outputs      y_i = sum_j W_ij (C_i . B_j) u_j + W_i0 h_start C_i, with D, z

The backward is in ``triton_gradients.py``. The running sum is taken in float64 and kept as two float32 numbers whose
difference is exact: one float32 sum would lose the digits of small steps behind large ones. DOT is the dtype of the
matrix products' operands: that of half-precision inputs, as mamba-ssm does, float32 where an interpreter runs, whose
bfloat16 is silently wrong. Products are summed in float32 always. 64-bit offsets for batch, chunk and head, 32-bit
ones within.
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
