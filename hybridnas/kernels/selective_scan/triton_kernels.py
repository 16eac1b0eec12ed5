# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""The selective scan in Triton: chunks of T steps side by side, states in registers, float32 sums, no atomics.

Letters: B batch, L length, D channels, N state size, C chunks; tiles: BN >= N and a power of two, D1 channels.
A chunk of a diagonal recurrence is h_end = exp(A sum(delta)) h_start + (its own end from zero), so the forward is

    chunk_states    the end of every chunk from a zero state, all chunks at once
    pass_states     the chain over chunks: the state each one starts from; the backward keeps these
    chunk_outputs   the scan proper inside every chunk, all at once, with D, z and the final state

and the backward, which recomputes a chunk's states from its start as the Mamba paper does (arXiv 2312.00752, 3.3.2),

    chunk_gradients            dLoss/d(start) of every chunk from its own outputs alone
    pass_gradients             the chain from the last chunk to the first: dLoss/d(end) of each
    chunk_inputs_gradients     the gradients of all inputs; sums over channels, chunks and batch go to partial buffers

Inside a tile (BN, D1) lanes lie along D1, then BN: with D1 = 32 a thread owns all N states of one channel and
the sum over N needs no other lane; with D1 = 8 and N = 16 the sums over N and over channels, both needed in the
backward, cost the fewest exchanges. Steps past the end are masked to the identity (delta 0, decay 1). Every load is
widened to float32 before arithmetic: bfloat16 arithmetic is rounded on a GPU and silently wrong in Triton's
interpreter.
Bases of batch and chunk are 64-bit offsets, what lies within a chunk 32-bit ones: with 64 bits the backward spills.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) with a small relative error also where it is near zero, as small time steps are.

    log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, by its series: no fast logarithm is accurate near one.
    """
    e = exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    p = 0.0666666667 * q + 0.0769230769
    p = p * q + 0.0909090909
    p = p * q + 0.1111111111
    p = p * q + 0.1428571429
    p = p * q + 0.2
    p = p * q + 0.3333333333
    p = p * q + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * p


@triton.jit
def until(i, limit, here):
    """Return i < limit at a step that is ``here``, else false; a mask made with & is wrong in the interpreter."""
    return i < tl.where(here, limit, 0)


@triton.jit
def wide(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def narrow(pointer, offset, mask):
    return tl.load(pointer + offset, mask=mask, other=0.0).to(tl.float32)[:, None]


@triton.jit
def log2_decay(A, d, n, D, N):
    """Return A (BN, D1) in natural units; zero outside, where the decay is then one and nothing is added."""
    mask = (d < D)[None, :] & (n < N)[:, None]
    return tl.load(A + d[None, :].to(tl.int64) * N + n[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def vector(pointer, d, D):
    if pointer is not None:
        return tl.load(pointer + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        return tl.zeros(d.shape, tl.float32)


@triton.jit
def time_step(raw, inside, SOFTPLUS: tl.constexpr):
    return tl.where(inside, softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def decay(dt, a, reset_at, t, inside):
    """Return exp(dt A) (BN, D1), zero where a document begins; ``a`` is A."""
    kept = exp(dt[None, :] * a)
    if reset_at is not None:
        kept = tl.where(tl.load(reset_at + t, mask=inside, other=0).to(tl.int32) != 0, 0.0, kept)
    return kept


@triton.jit
def chunk_states(
    u, delta, A, B, bias, reset, states, sums,
    L, D, N, CHUNKS, u_b, u_l, dt_b, dt_l, B_b, B_l,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, U: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Store the end state of each chunk but the last from zero, states (B, C, N, D), and sum(delta), sums (B, C, D)."""
    blocks = tl.cdiv(D, D1)
    pid = tl.program_id(0)
    c = ((pid // blocks) % (CHUNKS - 1)).to(tl.int64)
    b = (pid // blocks // (CHUNKS - 1)).to(tl.int64)
    d, n = (pid % blocks) * D1 + tl.arange(0, D1), tl.arange(0, BN)
    d_in, n_in = d < D, n < N
    a, shift = log2_decay(A, d, n, D, N), vector(bias, d, D)
    start = c * T
    u_at, dt_at, B_at = u + b * u_b + start * u_l, delta + b * dt_b + start * dt_l, B + b * B_b + start * B_l
    reset_at = reset
    if reset is not None:
        reset_at = reset + b * L + start
    h, total = tl.zeros((BN, D1), tl.float32), tl.zeros((D1,), tl.float32)
    for t0 in range(0, T, U):
        for s in tl.static_range(U):
            t = t0 + s
            dt = time_step(wide(dt_at, t * dt_l + d, d_in) + shift, True, SOFTPLUS)
            x = dt * wide(u_at, t * u_l + d, d_in)
            h = decay(dt, a, reset_at, t, True) * h + x[None, :] * narrow(B_at, t * B_l + n, n_in)
            total += dt
    at = b * CHUNKS + c
    tl.store(sums + at * D + d, total, mask=d_in)
    mask = d_in[None, :] & n_in[:, None]
    tl.store(states + (at * N + n[:, None]) * D + d[None, :], h, mask=mask)


@triton.jit
def chunk_decay(A, sums, reset, b, c, L, D, d, n, N, CHUNKS, inside, T: tl.constexpr):
    """Return exp(A sum(delta)) of one chunk, zero if a document begins in it."""
    at = b * CHUNKS + c
    a = tl.load(A + d * N + n, mask=inside, other=0.0).to(tl.float32)
    kept = exp(a * tl.load(sums + at * D + d, mask=inside, other=0.0))
    if reset is not None:
        t = (at - b * CHUNKS) * T + tl.arange(0, T)
        flags = tl.load(reset + b * L + t, mask=t < L, other=0).to(tl.int32)
        kept = tl.where(tl.max(flags, 0) != 0, 0.0, kept)
    return kept


@triton.jit
def pass_states(A, initial, reset, states, sums, L, D, N, CHUNKS, T: tl.constexpr, BLOCK: tl.constexpr):
    """Replace the chunks' own end states by the states they start from; one program per BLOCK of (n, d)."""
    blocks = tl.cdiv(N * D, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = ((pid % blocks).to(tl.int64)) * BLOCK + tl.arange(0, BLOCK)
    inside, n, d = i < N * D, i // D, i % D
    h = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        h = tl.load(initial + (b * D + d) * N + n, mask=inside, other=0.0).to(tl.float32)
    for c in range(CHUNKS - 1):
        at = b * CHUNKS + c
        own = tl.load(states + at * N * D + i, mask=inside, other=0.0)
        kept = chunk_decay(A, sums, reset, b, c, L, D, d, n, N, CHUNKS, inside, T)
        tl.store(states + at * N * D + i, h, mask=inside)
        h = kept * h + own
    tl.store(states + (b * CHUNKS + CHUNKS - 1) * N * D + i, h, mask=inside)


@triton.jit
def chunk_outputs(
    u, delta, A, B, C, skip, z, bias, reset, states, y, final,
    L, D, N, CHUNKS, u_b, u_l, dt_b, dt_l, B_b, B_l, C_b, C_l, z_b, z_l,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, U: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Store y (B, L, D) of each chunk from its start state, and from the last chunk the final state (B, D, N)."""
    blocks = tl.cdiv(D, D1)
    pid = tl.program_id(0)
    c = ((pid // blocks) % CHUNKS).to(tl.int64)
    b = (pid // blocks // CHUNKS).to(tl.int64)
    d, n = (pid % blocks) * D1 + tl.arange(0, D1), tl.arange(0, BN)
    d_in, n_in = d < D, n < N
    dn_in = d_in[None, :] & n_in[:, None]
    a, shift, through = log2_decay(A, d, n, D, N), vector(bias, d, D), vector(skip, d, D)
    start = c * T
    u_at, dt_at, B_at = u + b * u_b + start * u_l, delta + b * dt_b + start * dt_l, B + b * B_b + start * B_l
    C_at, y_at = C + b * C_b + start * C_l, y + (b * L + start) * D
    z_at, reset_at = u_at, reset
    if reset is not None:
        reset_at = reset + b * L + start
    if z is not None:
        z_at = z + b * z_b + start * z_l
    at = ((b * CHUNKS + c) * N + n[:, None]) * D + d[None, :]
    h = tl.load(states + at, mask=dn_in, other=0.0)
    steps = tl.minimum(L - start, T).to(tl.int32)
    for t0 in range(0, steps, U):
        outputs = ()  # stored after the last load, so that loads of later steps need not wait for stores
        for s in tl.static_range(U):
            t = t0 + s
            here = t < steps
            both, n_here = until(d, D, here), until(n, N, here)
            dt = time_step(wide(dt_at, t * dt_l + d, both) + shift, here, SOFTPLUS)
            value = wide(u_at, t * u_l + d, both)
            x = (dt * value)[None, :] * narrow(B_at, t * B_l + n, n_here)
            h = decay(dt, a, reset_at, t, here) * h + x
            out = tl.sum(h * narrow(C_at, t * C_l + n, n_here), 0) + through * value
            if z is not None:
                gate = wide(z_at, t * z_l + d, both)
                out = out * gate * sigmoid(gate)
            outputs = outputs + (out,)  # noqa: RUF005
        for s in tl.static_range(U):
            tl.store(y_at + ((t0 + s) * D + d), outputs[s].to(y.dtype.element_ty), mask=until(d, D, t0 + s < steps))
    if c == CHUNKS - 1:
        tl.store(final + (b * D + d[None, :]) * N + n[:, None], h, mask=dn_in)


@triton.jit
def chunk_gradients(
    delta, A, C, z, bias, reset, dy, carry, sums,
    L, D, N, CHUNKS, dt_b, dt_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    SOFTPLUS: tl.constexpr, T: tl.constexpr, U: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Store dLoss/d(start) of chunks 1.. from their own outputs, carry (B, C, N, D) one place to the left, and sums."""
    blocks = tl.cdiv(D, D1)
    pid = tl.program_id(0)
    c = ((pid // blocks) % (CHUNKS - 1)).to(tl.int64) + 1
    b = (pid // blocks // (CHUNKS - 1)).to(tl.int64)
    d, n = (pid % blocks) * D1 + tl.arange(0, D1), tl.arange(0, BN)
    d_in, n_in = d < D, n < N
    a, shift = log2_decay(A, d, n, D, N), vector(bias, d, D)
    start = c * T
    dt_at, C_at, dy_at = delta + b * dt_b + start * dt_l, C + b * C_b + start * C_l, dy + b * dy_b + start * dy_l
    z_at, reset_at = dy_at, reset
    if reset is not None:
        reset_at = reset + b * L + start
    if z is not None:
        z_at = z + b * z_b + start * z_l
    e, total = tl.zeros((BN, D1), tl.float32), tl.zeros((D1,), tl.float32)
    steps = tl.minimum(L - start, T).to(tl.int32)
    for back in range(0, steps, U):
        for s in tl.static_range(U):
            t = steps - 1 - back - s
            here = t >= 0
            both, n_here = until(d, D, here), until(n, N, here)
            dt = time_step(wide(dt_at, t * dt_l + d, both) + shift, here, SOFTPLUS)
            g = wide(dy_at, t * dy_l + d, both)
            if z is not None:
                gate = wide(z_at, t * z_l + d, both)
                g = g * gate * sigmoid(gate)
            e += g[None, :] * narrow(C_at, t * C_l + n, n_here)
            e *= decay(dt, a, reset_at, t, here)
            total += dt
    at = b * CHUNKS + c
    tl.store(sums + at * D + d, total, mask=d_in)
    mask = d_in[None, :] & n_in[:, None]
    tl.store(carry + ((at - 1) * N + n[:, None]) * D + d[None, :], e, mask=mask)


@triton.jit
def pass_gradients(A, dfinal, reset, carry, sums, L, D, N, CHUNKS, T: tl.constexpr, BLOCK: tl.constexpr):
    """Replace them by dLoss/d(end) of every chunk, from the last, whose is the final state's gradient, to the first."""
    blocks = tl.cdiv(N * D, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks).to(tl.int64)
    i = ((pid % blocks).to(tl.int64)) * BLOCK + tl.arange(0, BLOCK)
    inside, n, d = i < N * D, i // D, i % D
    e = tl.zeros((BLOCK,), tl.float32)
    if dfinal is not None:
        e = tl.load(dfinal + (b * D + d) * N + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(carry + (b * CHUNKS + CHUNKS - 1) * N * D + i, e, mask=inside)
    for back in range(CHUNKS - 1):
        c = CHUNKS - 1 - back
        at = b * CHUNKS + c
        own = tl.load(carry + (at - 1) * N * D + i, mask=inside, other=0.0)
        kept = chunk_decay(A, sums, reset, b, c, L, D, d, n, N, CHUNKS, inside, T)
        e = kept * e + own
        tl.store(carry + (at - 1) * N * D + i, e, mask=inside)


@triton.jit
def chunk_inputs_gradients(
    u, delta, A, B, C, skip, z, bias, reset, states, carry, dy,
    scratch, du, ddelta, dz, dA, dB, dC, dskip, dbias, dinitial,
    L, D, N, BATCH, CHUNKS, PARTS, WIDTH, u_b, u_l, dt_b, dt_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    SOFTPLUS: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Store du, ddelta, dz (B, L, D) and the partial sums dA (B, C, N, D), dskip, dbias (B, C, D), dB, dC (P, B, L, N).

    A program has one chunk and WIDTH channels, block after block. A block walks its K * S steps forward once and
    keeps the states before each S in ``scratch``; then, from the last S to the first, walks them again keeping all S
    of them, and goes back. Each program has K + S states of scratch and uses them again for its next block.
    """
    pid = tl.program_id(0)
    part = (pid % PARTS).to(tl.int64)
    c = ((pid // PARTS) % CHUNKS).to(tl.int64)
    b = (pid // PARTS // CHUNKS).to(tl.int64)
    n = tl.arange(0, BN)
    n_in = n < N
    start = c * (K * S)
    steps = tl.minimum(L - start, K * S).to(tl.int32)
    groups = tl.cdiv(steps, S)
    u_at, dt_at, dy_at = u + b * u_b + start * u_l, delta + b * dt_b + start * dt_l, dy + b * dy_b + start * dy_l
    B_at, C_at, row = B + b * B_b + start * B_l, C + b * C_b + start * C_l, b * L + start
    z_at, dz_at, reset_at = u_at, du, reset
    if reset is not None:
        reset_at = reset + row
    if z is not None:
        z_at, dz_at = z + b * z_b + start * z_l, dz + row * D
    du_at, ddt_at, at = du + row * D, ddelta + row * D, b * CHUNKS + c
    dB_at, dC_at = dB + ((part * BATCH + b) * L + start) * N, dC + ((part * BATCH + b) * L + start) * N
    tile = n[:, None] * D1 + tl.arange(0, D1)[None, :]
    kept_at = scratch + pid.to(tl.int64) * ((K + S) * BN * D1) + tile
    for first in range(part.to(tl.int32) * WIDTH, tl.minimum((part.to(tl.int32) + 1) * WIDTH, D), D1):
        d = first + tl.arange(0, D1)
        d_in = d < D
        dn_in = d_in[None, :] & n_in[:, None]
        a, shift, through = log2_decay(A, d, n, D, N), vector(bias, d, D), vector(skip, d, D)
        dn_at = (at * N + n[:, None]) * D + d[None, :]
        h = tl.load(states + dn_at, mask=dn_in, other=0.0)
        for k in range(groups - 1):
            tl.store(kept_at + k * (BN * D1), h)
            for t in range(k * S, k * S + tl.minimum(S, steps)):
                dt = time_step(wide(dt_at, t * dt_l + d, d_in) + shift, True, SOFTPLUS)
                x = dt * wide(u_at, t * u_l + d, d_in)
                h = decay(dt, a, reset_at, t, True) * h + x[None, :] * narrow(B_at, t * B_l + n, n_in)
        tl.store(kept_at + (groups - 1) * (BN * D1), h)
        tl.debug_barrier()  # a thread may read what another wrote
        e = tl.load(carry + dn_at, mask=dn_in, other=0.0)
        grad_a = tl.zeros((BN, D1), tl.float32)
        grad_skip, grad_shift = tl.zeros((D1,), tl.float32), tl.zeros((D1,), tl.float32)
        for back in range(groups):
            k = groups - 1 - back
            h = tl.load(kept_at + k * (BN * D1))
            count = tl.minimum(S, steps - k * S)  # not a constant: unrolled loops spill registers
            for s in range(count):
                t = k * S + s
                dt = time_step(wide(dt_at, t * dt_l + d, d_in) + shift, True, SOFTPLUS)
                tl.store(kept_at + (K + s) * (BN * D1), h)
                x = dt * wide(u_at, t * u_l + d, d_in)
                h = decay(dt, a, reset_at, t, True) * h + x[None, :] * narrow(B_at, t * B_l + n, n_in)
            tl.debug_barrier()
            for r in range(count):
                s = count - 1 - r
                t = k * S + s
                raw = wide(dt_at, t * dt_l + d, d_in) + shift
                value = wide(u_at, t * u_l + d, d_in)
                dt = time_step(raw, True, SOFTPLUS)
                C_t, B_t = narrow(C_at, t * C_l + n, n_in), narrow(B_at, t * B_l + n, n_in)
                g = wide(dy_at, t * dy_l + d, d_in)
                if z is not None:
                    gate = wide(z_at, t * z_l + d, d_in)
                    open_ = sigmoid(gate)
                    ungated = tl.sum(h * C_t, 0) + through * value
                    slope = open_ * (1.0 + gate * (1.0 - open_))
                    tl.store(dz_at + (t * D + d), (g * ungated * slope).to(dz.dtype.element_ty), mask=d_in)
                    g = g * gate * open_
                e += g[None, :] * C_t
                x = dt * value
                grad_C = tl.sum(g[None, :] * h, 1)
                grad_B = tl.sum(e * x[None, :], 1)
                grad_x = tl.sum(e * B_t, 0)
                e *= decay(dt, a, reset_at, t, True)
                h = tl.load(kept_at + (K + s) * (BN * D1))
                slope_a = e * h
                grad_a += slope_a * dt[None, :]
                grad_dt = tl.sum(slope_a * a, 0) + grad_x * value
                if SOFTPLUS:
                    grad_dt *= sigmoid(raw)
                grad_shift += grad_dt
                grad_skip += g * value
                grad_u = grad_x * dt + g * through
                tl.store(du_at + (t * D + d), grad_u.to(du.dtype.element_ty), mask=d_in)
                tl.store(ddt_at + (t * D + d), grad_dt.to(ddelta.dtype.element_ty), mask=d_in)
                if first > part * WIDTH:
                    grad_B += tl.load(dB_at + (t * N + n), mask=n_in, other=0.0)
                    grad_C += tl.load(dC_at + (t * N + n), mask=n_in, other=0.0)
                tl.store(dB_at + (t * N + n), grad_B, mask=n_in)
                tl.store(dC_at + (t * N + n), grad_C, mask=n_in)
        tl.store(dA + dn_at, grad_a, mask=dn_in)
        tl.store(dskip + at * D + d, grad_skip, mask=d_in)
        tl.store(dbias + at * D + d, grad_shift, mask=d_in)
        if c == 0:
            tl.store(dinitial + (b * D + d[None, :]) * N + n[:, None], e, mask=dn_in)
        tl.debug_barrier()  # the next block of channels adds to dB and dC of this one
