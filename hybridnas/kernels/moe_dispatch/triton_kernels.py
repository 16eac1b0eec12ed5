# mypy: ignore-errors
# Triton reads the source of these functions; Python's types do not describe them.
"""Routed experts in Triton: choices grouped by expert, one matrix product for all experts, rows added back to tokens.

Letters: N tokens, K choices a token, S choices in rows of one expert after another, E experts; a product takes rows
(S, I) with one (I, O) matrix an expert; tiles: BM rows, BI and BO of its sides, BS choices, BE >= E.

    count_choices    choices of each expert in every block of choices
    place_choices    the row of every choice, in the order of tokens: a counting sort, stable, without atomics
    grouped_rows     rows times their expert's matrix, gathered from the tokens while they are read; forward and dx
    grouped_weights  each expert's rows, transposed, times their outputs' gradients: its matrix's and bias's gradient
    combine          each token's K rows, weighted and added; spread is its backward

Sums are float32 and every load is widened, except that DOT, the dtype of the products' operands, is that of
half-precision inputs (float32 in an interpreter, whose bfloat16 is silently wrong). Bases of rows, tokens and experts
are 64-bit offsets.
"""

import triton
import triton.language as tl


@triton.jit
def count_choices(expert, counts, S, E, BS: tl.constexpr, BE: tl.constexpr):
    """Store how many of BS choices chose each expert, counts (blocks, E)."""
    block = tl.program_id(0).to(tl.int64)
    s = block * BS + tl.arange(0, BS)
    chosen = tl.load(expert + s, mask=s < S, other=-1).to(tl.int32)
    for first in range(0, E, BE):
        e = first + tl.arange(0, BE)
        hits = (chosen[:, None] == e[None, :]).to(tl.int32)
        tl.store(counts + block * E + e, tl.sum(hits, 0), mask=e < E)


@triton.jit
def place_choices(expert, first, ends, slot, choice, S, E, BS: tl.constexpr):
    """Store each choice's row in slot, -1 where its expert is full, and each row's choice.

    ``first`` (blocks, E) is the row of a block's first choice of an expert, ``ends`` (E,) where its rows end.
    """
    block = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BS)
    s = block * BS + i
    chosen = tl.load(expert + s, mask=s < S, other=-1).to(tl.int32)
    again = tl.load(expert + block * BS + i[None, :], mask=(block * BS + i[None, :]) < S, other=-2).to(tl.int32)
    earlier = tl.where(i[None, :] < i[:, None], (chosen[:, None] == again).to(tl.int32), 0)
    row = tl.load(first + block * E + chosen, mask=s < S, other=0) + tl.sum(earlier, 1)
    end = tl.load(ends + chosen, mask=s < S, other=0)
    tl.store(slot + s, tl.where(row < end, row, -1), mask=s < S)
    tl.store(choice + row, s.to(tl.int32), mask=row < end)


@triton.jit
def rows_of(ends, tile, E, BM: tl.constexpr, BE: tl.constexpr):
    """Return the expert of a tile of rows (E or more: none), the first of its rows and where the expert's end."""
    e = tl.arange(0, BE)
    stop = tl.load(ends + e, mask=e < E, other=0)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (stop - start + BM - 1) // BM, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    here = e == expert
    before = tl.sum(tl.where(here, upto - tiles, 0), 0)
    return expert, tl.sum(tl.where(here, start, 0), 0) + (tile - before) * BM, tl.sum(tl.where(here, stop, 0), 0)


@triton.jit
def grouped_rows(
    a, weight, bias, source, ends, out, E, IN, OUT, a_row, w_e, w_in, w_out,
    BE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a[source] weight[expert] + bias[expert], out (S, OUT), for the rows before the last end."""
    expert, first, stop = rows_of(ends, tl.program_id(0), E, BM, BE)
    if expert < E:
        s, o = first + tl.arange(0, BM), tl.program_id(1) * BO + tl.arange(0, BO)
        s_in, o_in = s < stop, o < OUT
        at = s
        if source is not None:
            at = tl.load(source + s, mask=s_in, other=0)
        a_at, w_at = a + at.to(tl.int64)[:, None] * a_row, weight + expert.to(tl.int64) * w_e
        total = tl.zeros((BM, BO), tl.float32)
        for i0 in range(0, IN, BI):
            i = i0 + tl.arange(0, BI)
            rows = tl.load(a_at + i[None, :], mask=s_in[:, None] & (i < IN)[None, :], other=0.0)
            inside = (i < IN)[:, None] & o_in[None, :]
            columns = tl.load(w_at + (i[:, None] * w_in + o[None, :] * w_out), mask=inside, other=0.0)
            total = tl.dot(rows.to(DOT), columns.to(DOT), total, input_precision=PRECISION)
        if bias is not None:
            total += tl.load(bias + expert.to(tl.int64) * OUT + o, mask=o_in, other=0.0).to(tl.float32)[None, :]
        place = out + s.to(tl.int64)[:, None] * OUT + o[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=s_in[:, None] & o_in[None, :])


@triton.jit
def grouped_weights(
    a, dy, source, ends, dweight, dbias, IN, OUT, a_row, dy_row,
    BM: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store sum over an expert's rows of a[source]^T dy, dweight (E, IN, OUT), and of dy, dbias (E, OUT)."""
    across = tl.cdiv(IN, BI)
    expert, block = tl.program_id(0) // across, tl.program_id(0) % across
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    i, o = block * BI + tl.arange(0, BI), tl.program_id(1) * BO + tl.arange(0, BO)
    i_in, o_in = i < IN, o < OUT
    total, sums = tl.zeros((BI, BO), tl.float32), tl.zeros((BO,), tl.float32)
    for s0 in range(start, stop, BM):
        s = s0 + tl.arange(0, BM)
        s_in, at = s < stop, s
        if source is not None:
            at = tl.load(source + s, mask=s_in, other=0)
        rows = tl.load(a + at.to(tl.int64)[None, :] * a_row + i[:, None], mask=i_in[:, None] & s_in[None, :], other=0.0)
        given = tl.load(
            dy + s.to(tl.int64)[:, None] * dy_row + o[None, :], mask=s_in[:, None] & o_in[None, :], other=0.0
        )
        total = tl.dot(rows.to(DOT), given.to(DOT), total, input_precision=PRECISION)
        if dbias is not None:
            sums += tl.sum(given.to(tl.float32), 0)
    at = dweight + expert.to(tl.int64) * IN * OUT + (i[:, None] * OUT + o[None, :])
    tl.store(at, total.to(dweight.dtype.element_ty), mask=i_in[:, None] & o_in[None, :])
    if dbias is not None:  # noqa: SIM102, which the compiler knows, unlike the next
        if block == 0:
            tl.store(dbias + expert.to(tl.int64) * OUT + o, sums.to(dbias.dtype.element_ty), mask=o_in)


@triton.jit
def combine(rows, gate, slot, y, OUT, K, BLOCK: tl.constexpr):
    """Store y (N, OUT), the sum of a token's K rows, each times its gate or, without gates, 1; -1 is no row."""
    blocks = tl.cdiv(OUT, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        at = tl.load(slot + n * K + k).to(tl.int64)
        row = tl.load(rows + at * OUT + o, mask=o < tl.where(at >= 0, OUT, 0), other=0.0).to(tl.float32)
        if gate is not None:
            row *= tl.load(gate + n * K + k).to(tl.float32)
        total += row
    tl.store(y + n * OUT + o, total.to(y.dtype.element_ty), mask=o < OUT)


@triton.jit
def spread(dy, rows, gate, slot, drows, dgate, OUT, K, dy_row, BLOCK: tl.constexpr):
    """Store gate * dy in each token's rows, drows (S, OUT), and dy . row, dgate (N, K); one program a token."""
    n = tl.program_id(0).to(tl.int64)
    for k in range(K):
        at = tl.load(slot + n * K + k).to(tl.int64)
        width = tl.where(at >= 0, OUT, 0)
        weight = tl.load(gate + n * K + k).to(tl.float32)
        products = tl.zeros((BLOCK,), tl.float32)
        for o0 in range(0, OUT, BLOCK):
            o = o0 + tl.arange(0, BLOCK)
            given = tl.load(dy + n * dy_row + o, mask=o < width, other=0.0).to(tl.float32)
            products += given * tl.load(rows + at * OUT + o, mask=o < width, other=0.0).to(tl.float32)
            tl.store(drows + at * OUT + o, (weight * given).to(drows.dtype.element_ty), mask=o < width)
        tl.store(dgate + n * K + k, tl.sum(products, 0).to(dgate.dtype.element_ty))
