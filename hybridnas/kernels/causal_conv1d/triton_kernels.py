# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""The causal depthwise convolution in Triton, with bias, SiLU, initial state and document boundaries fused.

Letters: B batch, L length, D channels, K taps; tiles: BL time steps x BD channels. Sums are float32 and every load
is widened before arithmetic. The backward computes the values before the activation again instead of keeping them:
it holds the 2K - 1 rows of inputs around its tile. No atomics: dweight and dbias go to one partial sum per tile.
"""

import triton
import triton.language as tl

from hybridnas.kernels.selective_scan.triton_kernels import sigmoid


@triton.jit
def place(D, rows, BL: tl.constexpr, BD: tl.constexpr):
    """Return batch (64 bits), tile of rows, rows (BL, 1) within the tile and channels (1, BD) of this program."""
    blocks, pid = tl.cdiv(D, BD), tl.program_id(0)
    tiles = tl.cdiv(rows, BL)
    d = (pid % blocks) * BD + tl.arange(0, BD)[None, :]
    return (pid // blocks // tiles).to(tl.int64), (pid // blocks) % tiles, tl.arange(0, BL)[:, None], d


@triton.jit
def input_at(x_at, initial_at, t, i, back, d, L, D, x_l, K: tl.constexpr):
    """Return x (BL, BD) ``back`` steps before t, in float32: from the initial state before the start, zero outside."""
    s = t - back
    value = tl.load(x_at + ((i - back) * x_l + d), mask=(s >= 0) & (s < L) & (d < D), other=0.0).to(tl.float32)
    if initial_at is not None:
        before = (s < 0) & (s >= 1 - K) & (d < D)
        value += tl.load(initial_at + ((K - 1 + s) * D + d), mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def document_at(document, row, s, L):
    """Return the document (BL, 1) of positions s; what comes before the start belongs to the first, 0."""
    return tl.load(document + row + s, mask=(s >= 0) & (s < L), other=0)


@triton.jit
def conv_forward(
    x, weight, bias, initial, document, y, L, D, x_b, x_l,
    SILU: tl.constexpr, K: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store y (B, L, D); weight (K, D), document (B, L) int32 or None."""
    b, tile, i, d = place(D, L, BL, BD)
    first = tile.to(tl.int64) * BL
    t = first + i
    x_at, initial_at, row = x + b * x_b + first * x_l, initial, b * L
    if initial is not None:
        initial_at = initial + b * (K - 1) * D
    total = tl.zeros((BL, BD), tl.float32)
    if bias is not None:
        total += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        value = input_at(x_at, initial_at, t, i, K - 1 - k, d, L, D, x_l, K)
        if document is not None:
            same = document_at(document, row, t - (K - 1 - k), L) == document_at(document, row, t, L)
            value = tl.where(same, value, 0.0)
        total += value * tl.load(weight + k * D + d, mask=d < D, other=0.0).to(tl.float32)
    if SILU:
        total *= sigmoid(total)
    tl.store(y + (row + first) * D + (i * D + d), total.to(y.dtype.element_ty), mask=(t < L) & (d < D))


@triton.jit
def conv_backward(
    x, weight, bias, initial, document, dy, dx, dweight, dbias, dinitial, L, D, x_b, x_l, dy_b, dy_l,
    SILU: tl.constexpr, K: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store dx (B, L, D), dinitial (B, K - 1, D) and partial sums dweight (B, tiles, K, D), dbias (B, tiles, D).

    Rows begin K - 1 before the start, where dx is the initial state's gradient.
    """
    b, tile, i, d = place(D, L + K - 1, BL, BD)
    first = tile.to(tl.int64) * BL - (K - 1)
    s, row, d_in = first + i, b * L, d < D
    x_at, dy_at, initial_at = x + b * x_b + first * x_l, dy + b * dy_b + first * dy_l, initial
    if initial is not None:
        initial_at = initial + b * (K - 1) * D
    inputs, documents, weights = (), (), ()
    for o in tl.static_range(2 * K - 1):
        inputs = inputs + (input_at(x_at, initial_at, s, i, K - 1 - o, d, L, D, x_l, K),)  # noqa: RUF005
        if document is not None:
            documents = documents + (document_at(document, row, s - (K - 1 - o), L),)  # noqa: RUF005
    for k in tl.static_range(K):
        weights = weights + (tl.load(weight + k * D + d, mask=d_in, other=0.0).to(tl.float32),)  # noqa: RUF005
    shift = tl.zeros((1, BD), tl.float32)
    if bias is not None:
        shift = tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    total = tl.zeros((BL, BD), tl.float32)
    for j in tl.static_range(K):
        t = s + j
        inside = (t >= 0) & (t < L) & d_in
        g = tl.load(dy_at + ((i + j) * dy_l + d), mask=inside, other=0.0).to(tl.float32)
        if SILU:
            before = tl.zeros((BL, BD), tl.float32) + shift
            for k in tl.static_range(K):
                value = inputs[j + k]
                if document is not None:
                    value = tl.where(documents[j + k] == documents[j + K - 1], value, 0.0)
                before += value * weights[k]
            open_ = sigmoid(before)
            g *= open_ * (1.0 + before * (1.0 - open_))
        reached = g
        if document is not None:
            reached = tl.where(documents[K - 1] == documents[j + K - 1], g, 0.0)
        total += reached * weights[K - 1 - j]
        if j == 0:
            at = b * tl.cdiv(L + K - 1, BL) + tile
            for k in tl.static_range(K):
                value = inputs[k]
                if document is not None:
                    value = tl.where(documents[k] == documents[K - 1], value, 0.0)
                partial = tl.sum(g * value, 0)[None, :]
                tl.store(dweight + (at * K + k) * D + d, partial, mask=d_in)
            tl.store(dbias + at * D + d, tl.sum(g, 0)[None, :], mask=d_in)
    tl.store(dx + (row + first) * D + (i * D + d), total.to(dx.dtype.element_ty), mask=(s >= 0) & (s < L) & d_in)
    if initial is not None:
        tl.store(dinitial + b * (K - 1) * D + ((K - 1 + s) * D + d), total, mask=(s < 0) & d_in)
