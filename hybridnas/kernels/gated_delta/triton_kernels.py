# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""Gated linear recurrences in Triton, forward and backward: matrix products in chunks, float32 states between them.

Letters: B batch, L length, H heads, R heads of a group that share q and k, K channels of a key, V channels of a value,
C chunks of T steps; tiles: T steps, BK >= 16 channels of a key, BV >= 16 of a value, rows of 16 steps. In a chunk, with
the log decay g (one number a head, or one a channel), G_i = g_1 + ... + g_i and s the scale of the queries,

    gd_sums          G of decays by head, as two float32 numbers
    gd_operands      s q exp(G_i), k exp(G_i), k exp(G_T - G_i) and exp(G_T), for the chunk's first and last state
    gd_head_pairs    P_ij = s q_i . exp(G_i - G_j) k_j for j <= i, A_ij = k_i . exp(G_i - G_j) k_j for j < i,
    gd_channel_pairs   the same for decays by channel
    gd_inverse       J = (I + A diag(beta))^-1, with the delta rule
    gd_mix           J v and J (k exp(G)); in the backward P^T do and J^T (beta du)
    gd_pass_states   the chain over chunks: r = J v - J (k exp(G)) S, S = exp(G_T) S + (k exp(G_T - G))^T u, where
                     u = beta r is what a step adds along its key (v itself without the delta rule)
    gd_outputs       o = (s q exp(G)) S + P u

Backward, from the kept r and start states S, the rest recomputed; z = J^T (beta du) is the gradient of v:

    gd_pass_gradients      the chain from the last chunk to the first: dLoss/d(end) of each, E, and
                           du = P^T do + (k exp(G_T - G)) E
    gd_pairs_gradients     dP = do u^T, dA = -z u^T, dbeta = r . (du - A^T z)
    gd_states_gradients    do S^T, -z S^T and u E^T: the gradients of what gd_operands makes
    gd_head_gradients      dq, dk, and what the sums G get; gd_channel_gradients the same by channel
    gd_head_decays         the gradient of g from these; gd_channel_decays the same by channel

r instead of u is kept because dbeta needs it where beta is 0. A log decay below -1000 is taken as -1000, whose exp is
0: no difference of infinities is formed. Decays by channel are products of at most two factors, from j to the start of
i's rows of 16 and from there to i, or exp(g_{j+1} + ... + g_i) itself within 16 steps: no exponent is positive, none
is a difference of two sums (arXiv 2312.06635, section 4.3). J is solved in rows of 16 (arXiv 2406.06484, section 3.2).

No atomics: the same inputs give the same bits. DOT is the dtype of the matrix products' operands (``operand_dtype``),
sums are float32. Row tensors (B, H, L, X) come with three steps; those of the kernels' own, (B, H, CT, X), are
contiguous, and are neither written nor read past L. 64-bit offsets for batch, chunk and head, 32-bit ones within.
Sources: Yang et al. 2024, arXiv 2412.06464; Kimi Team 2025, arXiv 2510.26692.
"""

import triton
import triton.language as tl

from hybridnas.kernels.selective_scan.triton_kernels import exp
from hybridnas.kernels.ssd.triton_kernels import matrix, place, sums_between

NOTHING_LEFT = tl.constexpr(-1000.0)  # exp of it is 0 in float32, and 256 of them are exact
ROWS = tl.constexpr(16)  # steps of a block inside a chunk: the least side of a matrix product


@triton.jit
def logs(pointer, t, n, step, first, last, K):
    """Return the log decays of steps first <= t < last and channels n in float32; 0, no decay, outside."""
    inside = (t >= first) & (t < last) & (n < K)
    return tl.maximum(tl.load(pointer + t * step + n, mask=inside, other=0.0).to(tl.float32), NOTHING_LEFT)


@triton.jit
def numbers(pointer, t, step, limit):
    """Return one number a step in float32, 0 outside."""
    return tl.load(pointer + t * step, mask=t < limit, other=0.0).to(tl.float32)


@triton.jit
def head_weights(hi, lo, i, j):
    """Return exp(G_i - G_j) for j <= i, else 0."""
    return tl.where(j <= i, exp(tl.where(j <= i, sums_between(hi, lo, i, j), 0.0)), 0.0)


@triton.jit
def gd_sums(log, hi, lo, L, H, CHUNKS, log_b, log_h, log_l, T: tl.constexpr):
    """Store the running sums of g in every chunk, (B, H, CT), as float32 numbers hi + lo of float64 sums."""
    b, c, h = place(CHUNKS, H)
    t = tl.arange(0, T)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    value = tl.maximum(numbers(log + b * log_b + h * log_h + c * T * log_l, t, log_l, left), NOTHING_LEFT)
    total = tl.cumsum(value.to(tl.float64), 0)
    high = total.to(tl.float32)
    at = (b * H + h) * (CHUNKS * T) + c * T + t
    tl.store(hi + at, high)
    tl.store(lo + at, (total - high.to(tl.float64)).to(tl.float32))


@triton.jit
def gd_operands(
    q, k, log, hi, lo, queries, keys, ends, through, scale,
    L, H, R, K, CHUNKS, q_b, q_h, q_l, k_b, k_h, k_l, log_b, log_h, log_l,
    CHANNEL: tl.constexpr, T: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store s q exp(G_i), with the delta rule k exp(G_i), k exp(G_T - G_i), (B, H, CT, K); exp(G_T), (B, C, H, K)."""
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T)[:, None], tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line = (b * H + h) * (CHUNKS * T) + c * T
    if CHANNEL:
        log_at = log + b * log_b + h * log_h + c * T * log_l
        own = logs(log_at, t, n, log_l, 0, left, K)
        start, passing = exp(tl.cumsum(own, 0)), exp(tl.sum(own, 0))[None, :]
        end = exp(tl.cumsum(logs(log_at, t + 1, n, log_l, 0, left, K), 0, reverse=True))
    else:
        start = exp(tl.load(hi + line + t) + tl.load(lo + line + t))
        end = exp(sums_between(hi + line, lo + line, T - 1, t))
        passing = exp(tl.load(hi + line + T - 1) + tl.load(lo + line + T - 1)) + tl.zeros((1, BK), tl.float32)
    inside, at = (t < left) & (n < K), line * K + (t * K + n)
    query = matrix(q + b * q_b + (h // R) * q_h + c * T * q_l, t, n, q_l, left, K).to(tl.float32)
    key = matrix(k + b * k_b + (h // R) * k_h + c * T * k_l, t, n, k_l, left, K).to(tl.float32)
    tl.store(queries + at, (query * start * scale).to(queries.dtype.element_ty), mask=inside)
    if keys is not None:
        tl.store(keys + at, (key * start).to(keys.dtype.element_ty), mask=inside)
    tl.store(ends + at, (key * end).to(ends.dtype.element_ty), mask=inside)
    tl.store(through + ((b * CHUNKS + c) * H + h) * K + n, passing, mask=n < K)


@triton.jit
def gd_head_pairs(
    q, k, hi, lo, P, A, scale, L, H, R, K, CHUNKS, q_b, q_h, q_l, k_b, k_h, k_l,
    T: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store P and, with the delta rule, A, (B, H, C, T, T), for decays by head."""
    b, c, h = place(CHUNKS, H)
    i, j = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line = (b * H + h) * (CHUNKS * T) + c * T
    q_at, k_at = q + b * q_b + (h // R) * q_h + c * T * q_l, k + b * k_b + (h // R) * k_h + c * T * k_l
    qk, kk = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)
    for n0 in range(0, K, BK):
        n = n0 + tl.arange(0, BK)
        columns = matrix(k_at, j, n[:, None], k_l, left, K).to(DOT)
        qk = tl.dot(matrix(q_at, i, n[None, :], q_l, left, K).to(DOT), columns, qk, input_precision=PRECISION)
        if A is not None:
            kk = tl.dot(matrix(k_at, i, n[None, :], k_l, left, K).to(DOT), columns, kk, input_precision=PRECISION)
    left_over = head_weights(hi + line, lo + line, i, j)
    tl.store(P + line * T + (i * T + j), (qk * left_over * scale).to(P.dtype.element_ty))
    if A is not None:
        tl.store(A + line * T + (i * T + j), tl.where(j < i, kk * left_over, 0.0))


@triton.jit
def gd_channel_pairs(
    q, k, log, P, A, scale, L, H, R, K, CHUNKS, q_b, q_h, q_l, k_b, k_h, k_l, log_b, log_h, log_l,
    T: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store 16 rows of P and, with the delta rule, of A, (B, H, C, T, T), for decays by channel."""
    b, c, h = place(CHUNKS, H)
    first = tl.program_id(1) * ROWS
    i, t = first + tl.arange(0, ROWS), tl.arange(0, T)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    q_at, k_at = q + b * q_b + (h // R) * q_h + c * T * q_l, k + b * k_b + (h // R) * k_h + c * T * k_l
    log_at = log + b * log_b + h * log_h + c * T * log_l
    total, total_k = tl.zeros((ROWS, T), tl.float32), tl.zeros((ROWS, T), tl.float32)
    before = tl.minimum(first, left)
    for n0 in range(0, K, BK):
        n = n0 + tl.arange(0, BK)
        query = matrix(q_at, i[:, None], n[None, :], q_l, left, K).to(tl.float32)
        key = matrix(k_at, i[:, None], n[None, :], k_l, left, K).to(tl.float32)
        within = exp(tl.cumsum(logs(log_at, i[:, None], n[None, :], log_l, 0, left, K), 0))
        behind = exp(tl.cumsum(logs(log_at, t[:, None] + 1, n[None, :], log_l, 0, before, K), 0, reverse=True))
        earlier = matrix(k_at, t[:, None], n[None, :], k_l, before, K).to(tl.float32) * behind
        columns = tl.trans(earlier.to(DOT))
        total = tl.dot((query * within).to(DOT), columns, total, input_precision=PRECISION)
        if A is not None:
            total_k = tl.dot((key * within).to(DOT), columns, total_k, input_precision=PRECISION)
        decay = tl.zeros((ROWS, BK), tl.float32)  # g_{j+1} + ... + g_i
        for back in range(ROWS):
            j = first + ROWS - 1 - back
            inside = n < tl.where(j < left, K, 0)
            one = tl.load(k_at + j * k_l + n, mask=inside, other=0.0).to(tl.float32)[None, :] * exp(decay)
            here = (t == j)[None, :] & (i >= j)[:, None]
            total += tl.where(here, tl.sum(query * one, 1)[:, None], 0.0)
            if A is not None:
                total_k += tl.where(here, tl.sum(key * one, 1)[:, None], 0.0)
            step = tl.maximum(tl.load(log_at + j * log_l + n, mask=inside, other=0.0).to(tl.float32), NOTHING_LEFT)
            decay += tl.where((i >= j)[:, None], step[None, :], 0.0)
    at = ((b * H + h) * (CHUNKS * T) + c * T) * T + (i[:, None] * T + t[None, :])
    tl.store(P + at, (total * scale).to(P.dtype.element_ty))
    if A is not None:
        tl.store(A + at, tl.where(t[None, :] < i[:, None], total_k, 0.0))


@triton.jit
def gd_inverse(
    A, beta, J, L, H, CHUNKS, beta_b, beta_h, beta_l,
    T: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store J = (I + A diag(beta))^-1, (B, H, C, T, T): blocks on the diagonal by substitution, then row by row."""
    b, c, h = place(CHUNKS, H)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    at = ((b * H + h) * (CHUNKS * T) + c * T) * T
    beta_at = beta + b * beta_b + h * beta_h + c * T * beta_l
    t = tl.arange(0, T)
    tl.store(J + at + t[:, None] * T + t[None, :], tl.zeros((T, T), tl.float32))
    block = tl.arange(0, BLOCKS)[:, None, None] * ROWS
    row, column = tl.arange(0, ROWS)[None, :, None], tl.arange(0, ROWS)[None, None, :]
    strengths = numbers(beta_at, block + column, beta_l, left)
    own = -tl.load(A + at + (block + row) * T + block + column) * strengths
    for i in range(1, ROWS):
        line = tl.sum(tl.where(row == i, own, 0.0), 1)  # (BLOCKS, ROWS)
        line += tl.sum(line[:, :, None] * own, 1)
        own = tl.where(row == i, line[:, None, :], own)
    tl.debug_barrier()  # the zeros of other threads lie below
    tl.store(J + at + (block + row) * T + block + column, own + tl.where(row == column, 1.0, 0.0))
    r = tl.arange(0, ROWS)
    for number in range(1, BLOCKS):
        tl.debug_barrier()  # a thread reads what others wrote
        first = number * ROWS
        ahead = tl.load(A + at + (first + r)[:, None] * T + t[None, :]) * numbers(beta_at, t, beta_l, left)[None, :]
        ahead = tl.where(t[None, :] < first, ahead, 0.0)
        above = tl.load(J + at + t[:, None] * T + t[None, :], mask=t[:, None] < first, other=0.0)
        reached = tl.dot(ahead, above, input_precision=PRECISION)
        diagonal = tl.load(J + at + (first + r)[:, None] * T + first + r[None, :])
        found = -tl.dot(diagonal, reached, input_precision=PRECISION)
        tl.store(J + at + (first + r)[:, None] * T + t[None, :], found, mask=t[None, :] < first)


@triton.jit
def gd_mix(
    matrices, x, beta, out, L, H, X, CHUNKS, x_b, x_h, x_l, beta_b, beta_h, beta_l, out_b, out_h, out_l,
    TRANSPOSED: tl.constexpr, T: tl.constexpr, BX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store M x, or M^T x, with x scaled by beta first where that is given; M (B, H, C, T, T), x (B, H, L, X)."""
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T), tl.program_id(1) * BX + tl.arange(0, BX)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    value = matrix(x + b * x_b + h * x_h + c * T * x_l, t[:, None], n[None, :], x_l, left, X)
    if beta is not None:
        value = (
            value.to(tl.float32) * numbers(beta + b * beta_b + h * beta_h + c * T * beta_l, t, beta_l, left)[:, None]
        )
    at = matrices + ((b * H + h) * (CHUNKS * T) + c * T) * T
    if TRANSPOSED:
        mixing = tl.load(at + t[None, :] * T + t[:, None])
    else:
        mixing = tl.load(at + t[:, None] * T + t[None, :])
    total = tl.dot(mixing.to(DOT), value.to(DOT), input_precision=PRECISION)
    out_at = out + b * out_b + h * out_h + c * T * out_l + (t[:, None] * out_l + n[None, :])
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(t < left)[:, None] & (n < X)[None, :])


@triton.jit
def gd_pass_states(
    mixed, ends, through, values, beta, initial, rest, states, final,
    L, H, K, V, CHUNKS, values_b, values_h, values_l, beta_b, beta_h, beta_l,
    T: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the states that the chunks start from, (B, C, H, K, V), and the last one, (B, H, K, V).

    With the delta rule ``mixed`` is J (k exp(G)), (B, H, CT, K), ``values`` J v, and r goes to ``rest``, (B, H, CT, V).
    """
    blocks = tl.cdiv(V, BV)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    t, k, v = tl.arange(0, T), tl.arange(0, BK), (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    kv = k[:, None] * V + v[None, :]
    values_at = values + b * values_b + h * values_h
    if beta is not None:
        beta += b * beta_b + h * beta_h
    state = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        state = tl.load(initial + head * K * V + kv, mask=inside, other=0.0).to(tl.float32)
    for c in range(CHUNKS):
        left = tl.minimum(L - c * T, T)
        line, chunk = (head * CHUNKS + c) * T, (b * CHUNKS + c) * H + h
        tl.store(states + chunk * K * V + kv, state, mask=inside)
        value = matrix(values_at, t[:, None], v[None, :], values_l, left, V)
        if mixed is not None:
            keys = matrix(mixed + line * K, t[:, None], k[None, :], K, left, K).to(DOT)
            value = value.to(tl.float32) - tl.dot(keys, state.to(DOT), input_precision=PRECISION)
            own = (t < left)[:, None] & (v < V)[None, :]
            at = rest + line * V + (t[:, None] * V + v[None, :])
            tl.store(at, value.to(rest.dtype.element_ty), mask=own)
            value *= numbers(beta, t, beta_l, left)[:, None]
            beta += T * beta_l  # a product could pass 32 bits
        state *= tl.load(through + chunk * K + k, mask=k < K, other=0.0)[:, None]
        columns = matrix(ends + line * K, t[None, :], k[:, None], K, left, K).to(DOT)
        state = tl.dot(columns, value.to(DOT), state, input_precision=PRECISION)
        values_at += T * values_l
    tl.store(final + head * K * V + kv, state, mask=inside)


@triton.jit
def added(values, beta, t, v, step, beta_step, left, V):
    """Return u, what each step adds along its key: beta r, or v without the delta rule."""
    value = matrix(values, t[:, None], v[None, :], step, left, V)
    if beta is not None:
        value = value.to(tl.float32) * numbers(beta, t, beta_step, left)[:, None]
    return value


@triton.jit
def gd_outputs(
    queries, P, states, values, beta, o,
    L, H, K, V, CHUNKS, values_b, values_h, values_l, beta_b, beta_h, beta_l, o_b, o_h, o_l,
    T: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store o = (s q exp(G)) S + P u, (B, H, L, V)."""
    b, c, h = place(CHUNKS, H)
    t, v = tl.arange(0, T), tl.program_id(1) * BV + tl.arange(0, BV)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line, state = (b * H + h) * (CHUNKS * T) + c * T, ((b * CHUNKS + c) * H + h) * K * V
    if beta is not None:
        beta += b * beta_b + h * beta_h + c * T * beta_l
    value = added(values + b * values_b + h * values_h + c * T * values_l, beta, t, v, values_l, beta_l, left, V)
    pairs = tl.load(P + line * T + (t[:, None] * T + t[None, :])).to(DOT)
    total = tl.dot(pairs, value.to(DOT), input_precision=PRECISION)
    for n0 in range(0, K, BK):
        n = n0 + tl.arange(0, BK)
        query = matrix(queries + line * K, t[:, None], n[None, :], K, left, K).to(DOT)
        start = matrix(states + state, n[:, None], v[None, :], V, K, V).to(DOT)
        total = tl.dot(query, start, total, input_precision=PRECISION)
    at = o + b * o_b + h * o_h + c * T * o_l + (t[:, None] * o_l + v[None, :])
    tl.store(at, total.to(o.dtype.element_ty), mask=(t < left)[:, None] & (v < V)[None, :])


@triton.jit
def gd_pass_gradients(
    mixed, ends, queries, through, do, local, du, beta, dfinal, carry, dinitial,
    L, H, K, V, CHUNKS, do_b, do_h, do_l, local_b, local_h, local_l, du_b, du_h, du_l, beta_b, beta_h, beta_l,
    T: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dLoss/d(end of chunk), carry (B, C, H, K, V), dinitial and du, from P^T do in ``local``."""
    blocks = tl.cdiv(V, BV)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    t, k, v = tl.arange(0, T), tl.arange(0, BK), (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    kv, last = k[:, None] * V + v[None, :], tl.cast(CHUNKS - 1, tl.int64) * T
    do_at, du_at = do + b * do_b + h * do_h + last * do_l, du + b * du_b + h * du_h + last * du_l
    local += b * local_b + h * local_h + last * local_l
    if beta is not None:
        beta += b * beta_b + h * beta_h + last * beta_l
    e = tl.zeros((BK, BV), tl.float32)
    if dfinal is not None:
        e = tl.load(dfinal + head * K * V + kv, mask=inside, other=0.0).to(tl.float32)
    for back in range(CHUNKS):
        c = CHUNKS - 1 - back
        left = tl.minimum(L - c * T, T)
        line, chunk = (head * CHUNKS + c) * T, (b * CHUNKS + c) * H + h
        tl.store(carry + chunk * K * V + kv, e, mask=inside)
        keys = matrix(ends + line * K, t[:, None], k[None, :], K, left, K).to(DOT)
        value = matrix(local, t[:, None], v[None, :], local_l, left, V).to(tl.float32)
        value = tl.dot(keys, e.to(DOT), value, input_precision=PRECISION)
        own = (t < left)[:, None] & (v < V)[None, :]
        tl.store(du_at + (t[:, None] * du_l + v[None, :]), value.to(du.dtype.element_ty), mask=own)
        e *= tl.load(through + chunk * K + k, mask=k < K, other=0.0)[:, None]
        columns = matrix(queries + line * K, t[None, :], k[:, None], K, left, K).to(DOT)
        given = matrix(do_at, t[:, None], v[None, :], do_l, left, V).to(DOT)
        e = tl.dot(columns, given, e, input_precision=PRECISION)
        if mixed is not None:
            value *= numbers(beta, t, beta_l, left)[:, None]
            columns = matrix(mixed + line * K, t[None, :], k[:, None], K, left, K).to(DOT)
            e -= tl.dot(columns, value.to(DOT), input_precision=PRECISION)
            beta -= T * beta_l
        do_at -= T * do_l
        du_at -= T * du_l
        local -= T * local_l
    tl.store(dinitial + head * K * V + kv, e, mask=inside)


@triton.jit
def gd_pairs_gradients(
    values, beta, do, du, z, P, A, dP, dA, dbeta, by_i, by_j,
    L, H, V, CHUNKS, values_b, values_h, values_l, beta_b, beta_h, beta_l, do_b, do_h, do_l, du_b, du_h, du_l,
    z_b, z_h, z_l, dbeta_b, dbeta_h, dbeta_l,
    T: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dP and, with the delta rule, dA, (B, H, C, T, T), and dbeta, (B, H, L).

    For decays by head also the gradients of the pairs' log weights, summed by i and by j, (B, H, CT).
    """
    b, c, h = place(CHUNKS, H)
    t = tl.arange(0, T)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    at = ((b * H + h) * (CHUNKS * T) + c * T) * T
    values_at, do_at = values + b * values_b + h * values_h + c * T * values_l, do + b * do_b + h * do_h + c * T * do_l
    products, products_k = tl.zeros((T, T), tl.float32), tl.zeros((T, T), tl.float32)
    strengths, of_beta = tl.zeros((T,), tl.float32), tl.zeros((T,), tl.float32)
    if beta is not None:
        du_at, z_at = du + b * du_b + h * du_h + c * T * du_l, z + b * z_b + h * z_h + c * T * z_l
        pairs = tl.load(A + at + (t[None, :] * T + t[:, None])).to(DOT)
        strengths = numbers(beta + b * beta_b + h * beta_h + c * T * beta_l, t, beta_l, left)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        value = matrix(values_at, t[:, None], v[None, :], values_l, left, V)
        given = matrix(do_at, t[:, None], v[None, :], do_l, left, V).to(DOT)
        if beta is not None:
            rest = value.to(tl.float32)
            later = matrix(z_at, t[:, None], v[None, :], z_l, left, V).to(DOT)
            slope = matrix(du_at, t[:, None], v[None, :], du_l, left, V).to(tl.float32)
            of_beta += tl.sum(rest * (slope - tl.dot(pairs, later, input_precision=PRECISION)), 1)
            columns = tl.trans((rest * strengths[:, None]).to(DOT))
            products_k = tl.dot(later, columns, products_k, input_precision=PRECISION)
        else:
            columns = tl.trans(value.to(DOT))
        products = tl.dot(given, columns, products, input_precision=PRECISION)
    i, j = t[:, None], t[None, :]
    tl.store(dP + at + (i * T + j), tl.where(j <= i, products, 0.0))
    if by_i is not None:  # the diagonal has no step between i and j
        products = tl.where(j < i, products * tl.load(P + at + (i * T + j)).to(tl.float32), 0.0)
    if beta is not None:
        tl.store(dA + at + (i * T + j), tl.where(j < i, -products_k, 0.0))
        tl.store(dbeta + b * dbeta_b + h * dbeta_h + c * T * dbeta_l + t * dbeta_l, of_beta, mask=t < left)
        if by_i is not None:
            products -= products_k * tl.load(A + at + (i * T + j))  # A is 0 for j >= i
    if by_i is not None:
        line = (b * H + h) * (CHUNKS * T) + c * T + t
        tl.store(by_i + line, tl.sum(products, 1))
        tl.store(by_j + line, tl.sum(products, 0))


@triton.jit
def gd_states_gradients(
    values, beta, do, z, states, carry, through, dqueries, dkeys, dends, dthrough,
    L, H, K, V, CHUNKS, values_b, values_h, values_l, beta_b, beta_h, beta_l, do_b, do_h, do_l, z_b, z_h, z_l,
    T: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store do S^T, with the delta rule -z S^T, and u E^T, (B, H, CT, K); dLoss/d(G_T) through S, (B, C, H, K)."""
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T), tl.program_id(1) * BK + tl.arange(0, BK)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line, chunk = (b * H + h) * (CHUNKS * T) + c * T, (b * CHUNKS + c) * H + h
    values_at, do_at = values + b * values_b + h * values_h + c * T * values_l, do + b * do_b + h * do_h + c * T * do_l
    if beta is not None:
        beta += b * beta_b + h * beta_h + c * T * beta_l
        z_at = z + b * z_b + h * z_h + c * T * z_l
    of_queries, of_keys = tl.zeros((T, BK), tl.float32), tl.zeros((T, BK), tl.float32)
    of_ends, passing = tl.zeros((T, BK), tl.float32), tl.zeros((BK,), tl.float32)
    for v0 in range(0, V, BV):
        v = v0 + tl.arange(0, BV)
        start = matrix(states + chunk * K * V, n[None, :], v[:, None], V, K, V)
        end = matrix(carry + chunk * K * V, n[None, :], v[:, None], V, K, V)
        passing += tl.sum(start * end, 0)
        given = matrix(do_at, t[:, None], v[None, :], do_l, left, V).to(DOT)
        of_queries = tl.dot(given, start.to(DOT), of_queries, input_precision=PRECISION)
        value = added(values_at, beta, t, v, values_l, beta_l, left, V).to(DOT)
        of_ends = tl.dot(value, end.to(DOT), of_ends, input_precision=PRECISION)
        if beta is not None:
            later = matrix(z_at, t[:, None], v[None, :], z_l, left, V).to(DOT)
            of_keys = tl.dot(later, start.to(DOT), of_keys, input_precision=PRECISION)
    inside, at = (t < left)[:, None] & (n < K)[None, :], line * K + (t[:, None] * K + n[None, :])
    tl.store(dqueries + at, of_queries, mask=inside)
    tl.store(dends + at, of_ends, mask=inside)
    if beta is not None:
        tl.store(dkeys + at, -of_keys, mask=inside)
    kept = tl.load(through + chunk * K + n, mask=n < K, other=0.0)
    tl.store(dthrough + chunk * K + n, passing * kept, mask=n < K)


@triton.jit
def gd_head_gradients(
    q, k, hi, lo, dP, dA, dqueries, dkeys, dends, dq, dk, starting, ending, scale,
    L, H, R, K, LINE, CHUNKS, q_b, q_h, q_l, k_b, k_h, k_l, dq_b, dq_h, dq_l, dk_b, dk_h, dk_l,
    T: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dq and dk, (B, H, L, K), and what G_i and G_T - G_i get by way of exp(G_i) and exp(G_T - G_i).

    That is ``starting`` and ``ending``, (K / BK, B, H, CT).
    """
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T), tl.program_id(1) * BK + tl.arange(0, BK)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line = (b * H + h) * (CHUNKS * T) + c * T
    i, j = t[:, None], t[None, :]
    maps, at = line * T + (i * T + j), line * K + (t[:, None] * K + n[None, :])
    inside = (t < left)[:, None] & (n < K)[None, :]
    start = exp(tl.load(hi + line + t) + tl.load(lo + line + t))[:, None]
    end = exp(sums_between(hi + line, lo + line, T - 1, t))[:, None]
    query = matrix(q + b * q_b + (h // R) * q_h + c * T * q_l, t[:, None], n[None, :], q_l, left, K)
    key = matrix(k + b * k_b + (h // R) * k_h + c * T * k_l, t[:, None], n[None, :], k_l, left, K)
    of_query = tl.load(dqueries + at, mask=inside, other=0.0) * start * scale
    of_key = tl.load(dends + at, mask=inside, other=0.0) * end
    of_start, of_end = tl.sum(of_query * query.to(tl.float32), 1), tl.sum(of_key * key.to(tl.float32), 1)
    pairs = (tl.load(dP + maps) * (head_weights(hi + line, lo + line, i, j) * scale)).to(DOT)
    of_query = tl.dot(pairs, key.to(DOT), of_query, input_precision=PRECISION)
    of_key = tl.dot(tl.trans(pairs), query.to(DOT), of_key, input_precision=PRECISION)
    if dA is not None:
        from_start = tl.load(dkeys + at, mask=inside, other=0.0) * start
        of_start += tl.sum(from_start * key.to(tl.float32), 1)
        pairs = (tl.load(dA + maps) * head_weights(hi + line, lo + line, i, j)).to(DOT)
        of_key = tl.dot(pairs, key.to(DOT), of_key + from_start, input_precision=PRECISION)
        of_key = tl.dot(tl.trans(pairs), key.to(DOT), of_key, input_precision=PRECISION)
    dq_at = dq + b * dq_b + h * dq_h + c * T * dq_l + (t[:, None] * dq_l + n[None, :])
    dk_at = dk + b * dk_b + h * dk_h + c * T * dk_l + (t[:, None] * dk_l + n[None, :])
    tl.store(dq_at, of_query.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk_at, of_key.to(dk.dtype.element_ty), mask=inside)
    part = tl.program_id(1).to(tl.int64) * LINE + line
    tl.store(starting + part + t, of_start)
    tl.store(ending + part + t, of_end)


@triton.jit
def gd_channel_gradients(
    q, k, log, dP, dA, dqueries, dkeys, dends, dq, dk, of_sums, of_ends, scale,
    L, H, R, K, CHUNKS, q_b, q_h, q_l, k_b, k_h, k_l, log_b, log_h, log_l, dq_b, dq_h, dq_l, dk_b, dk_h, dk_l,
    T: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store 16 rows of dq and dk, (B, H, L, K), and of the gradients of the sums G_i and G_T - G_i, (B, H, CT, K)."""
    b, c, h = place(CHUNKS, H)
    across = tl.cdiv(K, BK)
    first, n = (tl.program_id(1) // across) * ROWS, (tl.program_id(1) % across) * BK + tl.arange(0, BK)
    i, t = first + tl.arange(0, ROWS), tl.arange(0, T)
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line, n_ = (b * H + h) * (CHUNKS * T) + c * T, n[None, :]
    q_at, k_at = q + b * q_b + (h // R) * q_h + c * T * q_l, k + b * k_b + (h // R) * k_h + c * T * k_l
    log_at = log + b * log_b + h * log_h + c * T * log_l
    query = matrix(q_at, i[:, None], n_, q_l, left, K).to(tl.float32)
    key = matrix(k_at, i[:, None], n_, k_l, left, K).to(tl.float32)
    before, behind = tl.minimum(first, left), tl.minimum(first + ROWS, left)
    from_rows = tl.cumsum(logs(log_at, i[:, None], n_, log_l, 0, left, K), 0)
    to_rows = tl.cumsum(logs(log_at, i[:, None] + 1, n_, log_l, 0, behind, K), 0, reverse=True)
    # these rows with the columns before them
    columns = exp(tl.cumsum(logs(log_at, t[:, None] + 1, n_, log_l, 0, before, K), 0, reverse=True))
    columns = (matrix(k_at, t[:, None], n_, k_l, before, K).to(tl.float32) * columns).to(DOT)
    maps = line * T + (i[:, None] * T + t[None, :])
    earlier = (t < first)[None, :] & (i >= 0)[:, None]
    pairs = tl.load(dP + maps, mask=earlier, other=0.0).to(DOT)
    of_query = tl.dot(pairs, columns, input_precision=PRECISION) * (exp(from_rows) * scale)
    of_row = tl.zeros((ROWS, BK), tl.float32)
    if dA is not None:
        pairs = tl.load(dA + maps, mask=earlier, other=0.0).to(DOT)
        of_row = tl.dot(pairs, columns, input_precision=PRECISION) * exp(from_rows)
    # these rows as columns of the rows behind them
    inside = (t >= first + ROWS)[:, None] & (n < K)[None, :] & (t < left)[:, None]
    log_behind = logs(log_at, t[:, None], n_, log_l, behind, left, K)
    to_end = to_rows + tl.sum(log_behind, 0)[None, :]
    from_block = exp(tl.cumsum(log_behind, 0))
    maps = line * T + (t[None, :] * T + i[:, None])
    later = (t >= first + ROWS)[None, :] & (i >= 0)[:, None]
    pairs = tl.load(dP + maps, mask=later, other=0.0).to(DOT)
    rows = tl.load(q_at + t[:, None] * q_l + n_, mask=inside, other=0.0).to(tl.float32) * (from_block * scale)
    of_column = tl.dot(pairs, rows.to(DOT), input_precision=PRECISION)
    if dA is not None:
        pairs = tl.load(dA + maps, mask=later, other=0.0).to(DOT)
        rows = tl.load(k_at + t[:, None] * k_l + n_, mask=inside, other=0.0).to(tl.float32) * from_block
        of_column = tl.dot(pairs, rows.to(DOT), of_column, input_precision=PRECISION)
    of_column *= exp(to_rows)
    # among these rows, without the diagonal, which has no step between i and j
    decay = tl.zeros((ROWS, BK), tl.float32)  # g_{j+1} + ... + g_i
    for back in range(ROWS):
        j = first + ROWS - 1 - back
        at_j = n < tl.where(j < left, K, 0)
        kept = exp(decay)
        one = tl.load(k_at + j * k_l + n, mask=at_j, other=0.0).to(tl.float32)[None, :] * kept
        pair = tl.load(dP + line * T + (i * T + j), mask=i > j, other=0.0)[:, None] * scale
        of_query += pair * one
        column = pair * query * kept
        if dA is not None:
            pair = tl.load(dA + line * T + (i * T + j), mask=i > j, other=0.0)[:, None]
            of_row += pair * one
            column += pair * key * kept
        of_column += tl.where((i == j)[:, None], tl.sum(column, 0)[None, :], 0.0)
        step = tl.maximum(tl.load(log_at + j * log_l + n, mask=at_j, other=0.0).to(tl.float32), NOTHING_LEFT)
        decay += tl.where((i >= j)[:, None], step[None, :], 0.0)
    of_sum = query * of_query + key * (of_row - of_column)
    # with the chunk's first and last state
    at, own = line * K + (i[:, None] * K + n_), (i < left)[:, None] & (n < K)[None, :]
    start = exp(from_rows + tl.sum(logs(log_at, t[:, None], n_, log_l, 0, before, K), 0)[None, :])
    from_start = tl.load(dqueries + at, mask=own, other=0.0) * (start * scale)
    of_sum += query * from_start
    to_end = tl.load(dends + at, mask=own, other=0.0) * exp(to_end)
    diagonal = tl.load(dP + line * T + i * (T + 1))[:, None] * scale
    of_query += from_start + diagonal * key
    of_key = of_row + of_column + to_end + diagonal * query
    if dA is not None:
        from_start = tl.load(dkeys + at, mask=own, other=0.0) * start
        of_sum += key * from_start
        of_key += from_start
    dq_at = dq + b * dq_b + h * dq_h + c * T * dq_l + (i[:, None] * dq_l + n_)
    dk_at = dk + b * dk_b + h * dk_h + c * T * dk_l + (i[:, None] * dk_l + n_)
    tl.store(dq_at, of_query.to(dq.dtype.element_ty), mask=own)
    tl.store(dk_at, of_key.to(dk.dtype.element_ty), mask=own)
    tl.store(of_sums + at, of_sum, mask=own)
    tl.store(of_ends + at, key * to_end, mask=own)


@triton.jit
def gd_head_decays(
    by_i, by_j, starting, ending, dthrough, dlog, L, H, K, LINE, PARTS, CHUNKS, dlog_b, dlog_h, dlog_l,
    T: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Store the gradient of g by head, (B, H, L): g_m stands in the sums from m on, and in G_T - G_i before i = m."""
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T), tl.arange(0, BK)
    line = (b * H + h) * (CHUNKS * T) + c * T
    later, sooner = tl.load(by_i + line + t) - tl.load(by_j + line + t), tl.zeros((T,), tl.float32)
    for _ in range(PARTS):
        later += tl.load(starting + line + t)
        sooner += tl.load(ending + line + t - 1, mask=t > 0, other=0.0)
        starting, ending = starting + LINE, ending + LINE  # a product could pass 32 bits
    passing = tl.sum(tl.load(dthrough + ((b * CHUNKS + c) * H + h) * K + n, mask=n < K, other=0.0), 0)
    total = tl.cumsum(later, 0, reverse=True) + tl.cumsum(sooner, 0) + passing
    left = tl.minimum(L - c * T, T).to(tl.int32)
    at = dlog + b * dlog_b + h * dlog_h + c * T * dlog_l + t * dlog_l
    tl.store(at, total.to(dlog.dtype.element_ty), mask=t < left)


@triton.jit
def gd_channel_decays(
    of_sums, of_ends, dthrough, dlog, L, H, K, CHUNKS, dlog_b, dlog_h, dlog_l, T: tl.constexpr, BK: tl.constexpr
):
    """Store the gradient of g by channel, (B, H, L, K), as for decays by head."""
    b, c, h = place(CHUNKS, H)
    t, n = tl.arange(0, T)[:, None], tl.program_id(1) * BK + tl.arange(0, BK)[None, :]
    left = tl.minimum(L - c * T, T).to(tl.int32)
    line = (b * H + h) * (CHUNKS * T) + c * T
    total = tl.cumsum(matrix(of_sums + line * K, t, n, K, left, K), 0, reverse=True)
    sooner = tl.load(of_ends + line * K + ((t - 1) * K + n), mask=(t > 0) & (t <= left) & (n < K), other=0.0)
    total += tl.cumsum(sooner, 0)
    total += tl.load(dthrough + ((b * CHUNKS + c) * H + h) * K + n, mask=n < K, other=0.0)
    at = dlog + b * dlog_b + h * dlog_h + c * T * dlog_l + (t * dlog_l + n)
    tl.store(at, total.to(dlog.dtype.element_ty), mask=(t < left) & (n < K))
