"""Routed experts on a GPU: the host's side of ``triton_kernels.py``, as three operators with torch's own activation.

Imports triton at its top: imported only where it runs. Rows are sorted by expert; with a
capacity, those that it drops have none. No sizes are read back from the GPU, and nothing is added atomically: the same
inputs give the same bits. Letters: see reference.py; S rows, I and O the sides of an expert's matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build.arguments import rows as packed_rows
from hybridnas.kernels._register import register_differentiable_op, register_op
from hybridnas.kernels._triton.launch import Tile, launch, operand_dtype
from hybridnas.kernels._triton.shapes import MOE_CHOICES, blocks_of, power_of_two
from hybridnas.kernels.activations import activate
from hybridnas.kernels.moe_dispatch import triton_kernels as kernels
from hybridnas.kernels.moe_dispatch.reference import Experts

_Optional = Tensor | None

# rows, outputs, inputs, warps: of float32 matrices, which need three products each, and of half-precision ones
_WIDE = ((64, 64, 32, 4), (32, 64, 32, 4), (16, 64, 32, 4))
_HALF = ((64, 128, 64, 8), (64, 64, 64, 4), (16, 128, 64, 4))


def _sides(dtype: torch.dtype, limit: dict[str, int]) -> list[Tile]:
    sizes = _WIDE if dtype == torch.float32 else _HALF
    named = [(w, {"BM": m, "BO": o, "BI": i}) for m, o, i, w in sizes]
    most = {k: max(16, power_of_two(v)) for k, v in limit.items()}
    return list(dict.fromkeys(Tile.of(w, **{k: min(v, most[k]) for k, v in t.items()}) for w, t in named))


def group(expert_NK: Tensor, n_experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    """Return each choice's row (N, K) or -1, each row's choice (S,), where experts' rows end (E,), counts (E,)."""
    chosen, blocks = expert_NK.flatten().contiguous(), blocks_of(MOE_CHOICES, expert_NK.numel())
    counts = chosen.new_zeros(max(1, blocks), n_experts, dtype=torch.int32)
    launch(
        kernels.count_choices, lambda _: blocks, [Tile.of(4, BS=MOE_CHOICES, BE=min(32, power_of_two(n_experts)))], (),
        chosen.device, expert=chosen, counts=counts, S=chosen.numel(), E=n_experts,
    )  # fmt: skip
    upto = counts.cumsum(0, dtype=torch.int32)
    taken = upto[-1] if capacity is None else upto[-1].clamp(max=capacity)
    ends = taken.cumsum(0, dtype=torch.int32)
    most = chosen.numel() if capacity is None else min(chosen.numel(), n_experts * capacity)
    slot, choice = counts.new_empty(expert_NK.shape), counts.new_zeros(most)
    launch(
        kernels.place_choices, lambda _: blocks, [Tile.of(4, BS=MOE_CHOICES)], (), chosen.device, expert=chosen,
        first=(upto - counts + (ends - taken)), ends=ends, slot=slot, choice=choice, S=chosen.numel(), E=n_experts,
    )  # fmt: skip
    return slot, choice, ends, upto[-1].long()


def multiply(
    a: Tensor, weight: Tensor, bias: _Optional, source: _Optional, ends: Tensor, count: int, *, transposed: bool
) -> Tensor:
    """Return a[source] times each row's expert's matrix, or the ``transposed`` one, plus bias: (count, O), a's dtype.

    Rows that belong to no expert are zero.
    """
    a, weight = packed_rows(a), weight.contiguous()
    n_experts, (sides, steps) = weight.shape[0], (weight.shape[1:], weight.stride()[1:])
    (inner, outer), (w_in, w_out) = (sides[::-1], steps[::-1]) if transposed else (sides, steps)
    out = a.new_zeros(count, outer)
    launch(
        kernels.grouped_rows,
        lambda tile: (blocks_of(tile["BM"], count) + n_experts, blocks_of(tile["BO"], outer)),
        _sides(a.dtype, {"BM": count, "BO": outer, "BI": inner}), ("E", "IN", "OUT"), a.device,
        a=a, weight=weight, bias=None if bias is None else bias.contiguous(), source=source, ends=ends, out=out,
        E=n_experts, IN=inner, OUT=outer, a_row=a.stride(0), w_e=weight.stride(0), w_in=w_in, w_out=w_out,
        BE=power_of_two(n_experts), DOT=operand_dtype(a, weight), PRECISION=None,
    )  # fmt: skip
    return out


def weight_gradients(
    a: Tensor, weight: Tensor, bias: _Optional, source: _Optional, ends: Tensor, dy: Tensor
) -> tuple[Tensor, _Optional]:
    """Return the gradients of the experts' matrices (E, I, O) and biases (E, O), in their dtypes."""
    a, dy = packed_rows(a), packed_rows(dy)
    n_experts, inner, outer = weight.shape
    dweight = weight.new_empty(weight.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    launch(
        kernels.grouped_weights,
        lambda tile: (n_experts * blocks_of(tile["BI"], inner), blocks_of(tile["BO"], outer)),
        [
            tile._replace(constants=(("BM", dict(tile.constants)["BI"]), *tile.constants[1:2], ("BI", rows)))
            for tile in _sides(a.dtype, {"BM": inner, "BO": outer, "BI": a.shape[0]})
            for rows in (dict(tile.constants)["BM"],)
        ],
        ("IN", "OUT"), a.device,
        a=a, dy=dy, source=source, ends=ends, dweight=dweight, dbias=dbias, IN=inner, OUT=outer, a_row=a.stride(0),
        dy_row=dy.stride(0), DOT=operand_dtype(a, dy), PRECISION=None,
    )  # fmt: skip
    return dweight, dbias


def add_rows(rows: Tensor, gate: _Optional, slot: Tensor) -> Tensor:
    """Return each token's rows, weighted and added: (N, O)."""
    tokens, choices, width = *slot.shape, rows.shape[1]
    y, block = rows.new_empty(tokens, width), min(1024, power_of_two(width))
    launch(
        kernels.combine, lambda _: tokens * blocks_of(block, width), [Tile.of(4, BLOCK=block)], (), rows.device,
        rows=rows.contiguous(), gate=None if gate is None else gate.contiguous(), slot=slot, y=y, OUT=width, K=choices,
    )  # fmt: skip
    return y


def spread_rows(dy: Tensor, rows: Tensor, gate: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows (S, O), zero where no token has one, and of the gates (N, K)."""
    drows, dgate, dy = torch.zeros_like(rows), torch.empty_like(gate), packed_rows(dy)
    block = min(1024, power_of_two(rows.shape[1]))
    launch(
        kernels.spread, lambda _: slot.shape[0], [Tile.of(4, BLOCK=block)], (), rows.device, dy=dy, rows=rows,
        gate=gate, slot=slot, drows=drows, dgate=dgate, OUT=rows.shape[1], K=slot.shape[1], dy_row=dy.stride(0),
    )  # fmt: skip
    return drows, dgate


def _fake_group(expert: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    most = expert.numel() if capacity is None else min(expert.numel(), experts * capacity)
    ends = expert.new_empty(experts, dtype=torch.int32)
    return ends.new_empty(expert.shape), ends.new_empty(most), ends, expert.new_empty(experts, dtype=torch.int64)


register_op("moe_group", "Tensor expert, int experts, int? capacity", 4, run=group, fake=_fake_group)


def _count(a: Tensor, source: _Optional) -> int:
    return a.shape[0] if source is None else source.shape[0]


def _multiply(*args: Any) -> Tensor:
    a, weight, bias, source, _, ends = args
    return multiply(a, weight, bias, source, ends, _count(a, source), transposed=False)


def _fake_multiply(*args: Any) -> Tensor:
    a: Tensor = args[0]
    return a.new_empty(_count(a, args[3]), args[1].shape[2])


def _multiply_backward(*args: Any) -> tuple[Tensor, ...]:
    a, weight, bias, source, slot, ends, dy = args
    da = multiply(dy, weight, None, None, ends, dy.shape[0], transposed=True)
    if slot is not None:  # rows were gathered from tokens: back to these
        da = add_rows(da, None, slot)
    dweight, dbias = weight_gradients(a, weight, bias, source, ends, dy)
    return da, dweight, dy.new_empty(0) if dbias is None else dbias


def _fake_multiply_backward(*args: Any) -> tuple[Tensor, ...]:
    a, weight, bias, *_, dy = args
    dbias = dy.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return a.new_empty(a.shape), weight.new_empty(weight.shape), dbias


register_differentiable_op(
    "moe_multiply",
    "Tensor a, Tensor weight, Tensor? bias, Tensor? source, Tensor? slot, Tensor ends",
    1,
    forward=_multiply,
    fake=_fake_multiply,
    backward=_multiply_backward,
    fake_gradients=_fake_multiply_backward,
    gradients=3,
)


def _fake_combine(rows: Tensor, gate: Tensor, slot: Tensor) -> Tensor:
    return rows.new_empty(slot.shape[0], rows.shape[1])


def _combine_backward(rows: Tensor, gate: Tensor, slot: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return spread_rows(dy, rows.contiguous(), gate.contiguous(), slot)


def _fake_combine_backward(rows: Tensor, gate: Tensor, slot: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), gate.new_empty(gate.shape)


register_differentiable_op(
    "moe_combine",
    "Tensor rows, Tensor gate, Tensor slot",
    1,
    forward=add_rows,
    fake=_fake_combine,
    backward=_combine_backward,
    fake_gradients=_fake_combine_backward,
    gradients=2,
)


def token_choice_triton(
    x_ND: Tensor, gate_NK: Tensor, expert_NK: Tensor, experts: Experts, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Return y (N, O) in x's dtype, or autocast's, and the choices of each expert (E,), before any were dropped."""
    n_experts = experts.up_EDF.shape[0]
    x_ND, experts = _ready(x_ND, experts)
    slot_NK, choice_S, ends_E, counts_E = torch.ops.hybridnas.moe_group(expert_NK, n_experts, capacity)
    y_SO = _experts(x_ND, choice_S // expert_NK.shape[1], slot_NK, ends_E, experts)
    return torch.ops.hybridnas.moe_combine(y_SO, gate_NK, slot_NK), counts_E


def expert_choice_triton(x_ND: Tensor, gate_EC: Tensor, token_EC: Tensor, experts: Experts) -> Tensor:
    """Return y (N, O); a token may be picked by any number of experts, so torch gathers and adds the rows."""
    x_ND, experts = _ready(x_ND, experts)
    ends_E = torch.arange(1, token_EC.shape[0] + 1, device=x_ND.device, dtype=torch.int32) * token_EC.shape[1]
    y_NO = x_ND.new_zeros(x_ND.shape[0], experts.down_EFO.shape[2])
    y_SO = _experts(x_ND.index_select(0, token_EC.flatten()), None, None, ends_E, experts)
    return y_NO.index_add(0, token_EC.flatten(), y_SO * gate_EC.flatten()[:, None].to(y_SO.dtype))


def _experts(x: Tensor, source: _Optional, slot: _Optional, ends_E: Tensor, experts: Experts) -> Tensor:
    op = torch.ops.hybridnas.moe_multiply
    h_SF = activate(op(x, experts.up_EDF, experts.up_bias_EF, source, slot, ends_E), experts.activation, experts.gated)
    y_SO: Tensor = op(h_SF, experts.down_EFO, experts.down_bias_EO, None, None, ends_E)
    return y_SO


def _ready(x_ND: Tensor, experts: Experts) -> tuple[Tensor, Experts]:
    """Return x and the matrices in the dtype that autocast chooses."""
    device = x_ND.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_ND = x_ND.to(dtype)
        experts = experts._replace(up_EDF=experts.up_EDF.to(dtype), down_EFO=experts.down_EFO.to(dtype))
    return x_ND, experts
