"""Routed experts as three steps: gather rows by expert, two matrix products per expert, add back.

With a capacity the rows form a padded (E, C, D) block for ``bmm``: static shapes, empty slots weighted 0. Without one
they are ragged, sorted by expert, for ``grouped_mm``; where that refuses the sizes, they are padded to the fullest
expert. On a processor experts without a token multiply nothing: as soon as there is one, rows are ragged with a
capacity too, and where ``grouped_mm`` refuses, each expert that has rows is multiplied by itself. Both gathers are
``index_select``, whose backward is ``index_add`` of the same speed. A few tokens being decoded multiply their experts'
weights without a copy.
Letters: see reference.py; S slots, ordered by expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels.activations import activate
from hybridnas.kernels.moe_dispatch.reference import Experts, no_tokens

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GROUPED_STRIDE_BYTES = 16  # grouped_mm refuses matrices whose rows are not a multiple of this
_Weights = tuple[Any, Any, Any, Any]
_FEW = 8  # choices up to which a processor takes them singly: grouped_mm there visits all E experts, idle ones too
_PADDING = 2.0  # slots for a choice up to which one batched product is faster than one product for each expert


class _Slots(NamedTuple):
    token_S: Tensor  # the token of a slot; an empty slot repeats some token
    gate_S: Tensor  # its weight in the output; 0 in an empty slot
    ends_E: Tensor | None  # where each expert's rows end; None: E equal blocks


def token_choice_eager(
    x_ND: Tensor, gate_NK: Tensor, expert_NK: Tensor, experts: Experts, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Sort the choices by expert, keeping token order inside each, and run the experts on contiguous rows."""
    n_experts, top_k = experts.up_EDF.shape[0], expert_NK.shape[1]
    if x_ND.shape[0] == 0:
        return no_tokens(x_ND, gate_NK, experts), expert_NK.new_zeros(n_experts)
    if n_experts == 1 and capacity is None:
        return _weighted_expert(x_ND, gate_NK, experts, 0), expert_NK.new_full((1,), expert_NK.shape[0])
    # first what is no question of sizes: an exported program would keep the answer for its example as a condition
    few = not torch.compiler.is_exporting() and not torch.is_grad_enabled() and expert_NK.numel() <= _FEW
    if capacity is None and few and x_ND.device.type == "cpu":
        return _few(x_ND, gate_NK, expert_NK, experts), expert_NK.flatten().bincount(minlength=n_experts)
    sorted_expert_S, choice_S = torch.sort(expert_NK.flatten(), stable=True)
    everyone_E = torch.arange(n_experts, device=x_ND.device)
    ends_E = torch.searchsorted(sorted_expert_S, everyone_E, right=True)
    starts_E = torch.searchsorted(sorted_expert_S, everyone_E)
    counts_E = ends_E - starts_E
    slots_each = _slots_each(counts_E, capacity, x_ND, experts)
    if slots_each is None:
        if capacity is not None:
            place_S = torch.arange(choice_S.numel(), device=x_ND.device) - starts_E[sorted_expert_S]
            choice_S, ends_E = choice_S[place_S < capacity], counts_E.clamp(max=capacity).cumsum(0)
        slots = _Slots(choice_S // top_k, gate_NK.flatten()[choice_S], ends_E.to(torch.int32))
        return _run(x_ND, slots, experts), counts_E
    place_C = torch.arange(slots_each, device=x_ND.device)
    filled_EC = place_C < counts_E[:, None]
    row_S = (starts_E[:, None] + place_C).clamp(max=max(choice_S.numel() - 1, 0)).flatten()
    choice_S = choice_S[row_S]
    slots = _Slots(choice_S // top_k, gate_NK.flatten()[choice_S] * filled_EC.flatten(), None)
    return _run(x_ND, slots, experts), counts_E


def _slots_each(counts_E: Tensor, capacity: int | None, x_ND: Tensor, experts: Experts) -> int | None:
    """Return how many slots each expert has, empty ones included; None: as many as it has rows, and no empty ones."""
    on_cpu, n_tokens = x_ND.device.type == "cpu", x_ND.shape[0]
    if torch.compiler.is_exporting():  # shapes may not depend on data, nor use grouped_mm's rule (see below)
        return n_tokens if capacity is None else capacity
    if capacity is not None:  # elsewhere than on a processor, a look at the counts would have to wait for them
        ragged = on_cpu and not torch.compiler.is_compiling() and not bool(counts_E.all())
        return None if ragged else capacity
    if _grouped_mm_takes(x_ND, experts):
        return None
    fullest, rows = max(1, int(counts_E.max())), int(counts_E.sum())
    ragged = on_cpu and (not bool(counts_E.all()) or fullest * counts_E.numel() > _PADDING * rows)
    return None if ragged else fullest


def expert_choice_eager(x_ND: Tensor, gate_EC: Tensor, token_EC: Tensor, experts: Experts) -> Tensor:
    """Run every expert on the C tokens that it has picked."""
    if x_ND.shape[0] == 0:
        return no_tokens(x_ND, gate_EC, experts)
    return _run(x_ND, _Slots(token_EC.flatten(), gate_EC.flatten(), None), experts)


def _run(x_ND: Tensor, slots: _Slots, experts: Experts) -> Tensor:
    x_SD = x_ND.index_select(0, slots.token_S)
    if slots.ends_E is None:
        y_SO = _padded(x_SD, experts)
    else:
        ragged = _grouped if _grouped_mm_takes(x_ND, experts) else _expert_by_expert
        y_SO = ragged(x_SD, slots.ends_E, experts)
    weighted_SO = y_SO * slots.gate_S[:, None].to(y_SO.dtype)
    return y_SO.new_zeros(x_ND.shape[0], y_SO.shape[1]).index_add(0, slots.token_S, weighted_SO)


def _padded(x_SD: Tensor, experts: Experts) -> Tensor:
    h_ECF = torch.bmm(x_SD.view(experts.up_EDF.shape[0], -1, x_SD.shape[1]), experts.up_EDF)
    if experts.up_bias_EF is not None:
        h_ECF = h_ECF + experts.up_bias_EF[:, None].to(h_ECF.dtype)
    y_ECO = torch.bmm(activate(h_ECF, experts.activation, experts.gated), experts.down_EFO)
    if experts.down_bias_EO is not None:
        y_ECO = y_ECO + experts.down_bias_EO[:, None].to(y_ECO.dtype)
    return y_ECO.flatten(0, 1)


# Not compiled: grouped_mm's shape rule for compilation knows bfloat16 only (torch 2.13).
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grouped(x_SD: Tensor, ends_E: Tensor, experts: Experts) -> Tensor:
    dtype = _compute_dtype(x_SD)
    slot_S = torch.arange(x_SD.shape[0], device=x_SD.device, dtype=ends_E.dtype)
    has_bias = experts.up_bias_EF is not None or experts.down_bias_EO is not None
    expert_S = torch.searchsorted(ends_E, slot_S, right=True) if has_bias else slot_S
    h_SF = F.grouped_mm(x_SD.to(dtype), experts.up_EDF.to(dtype), offs=ends_E)
    if experts.up_bias_EF is not None:
        h_SF = h_SF + experts.up_bias_EF[expert_S].to(dtype)
    # Gradients reach both products through index_select and cat, so they are contiguous, which their backward needs.
    y_SO = F.grouped_mm(activate(h_SF, experts.activation, experts.gated), experts.down_EFO.to(dtype), offs=ends_E)
    if experts.down_bias_EO is not None:
        y_SO = y_SO + experts.down_bias_EO[expert_S].to(dtype)
    return y_SO


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _expert_by_expert(x_SD: Tensor, ends_E: Tensor, experts: Experts) -> Tensor:
    """Run the experts that have rows, each by itself."""
    ends = ends_E.tolist()
    weights: _Weights = experts[:4]
    if torch.is_grad_enabled():  # by unbind: the gradient of t[e] would be a whole tensor of zeros for every e
        up, down, up_bias, down_bias = (None if t is None else t.unbind() for t in weights)
        weights = up, down, up_bias, down_bias
    rows = [
        _one_expert(x_SD[start:end], weights, e, experts)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        if end > start
    ]
    return torch.cat(rows)


def _few(x_ND: Tensor, gate_NK: Tensor, expert_NK: Tensor, experts: Experts) -> Tensor:
    rows = [
        torch.cat([_weighted_expert(x_ND[n : n + 1], gate_NK[n, j], experts, e) for j, e in enumerate(chosen)])
        for n, chosen in enumerate(expert_NK.tolist())
    ]
    return torch.stack(rows).sum(dim=1)


def _weighted_expert(x_ND: Tensor, gate: Tensor, experts: Experts, e: int) -> Tensor:
    y_NO = _one_expert(x_ND, experts[:4], e, experts)
    return y_NO * gate.to(y_NO.dtype)


def _one_expert(x_ND: Tensor, weights: _Weights, e: int, experts: Experts) -> Tensor:
    """Return expert ``e`` of rows; ``weights``: up, down and their biases or None, each indexed by expert."""
    up_EDF, down_EFO, up_bias_EF, down_bias_EO = weights
    h_NF: Tensor = x_ND @ up_EDF[e]
    if up_bias_EF is not None:
        h_NF = h_NF + up_bias_EF[e].to(h_NF.dtype)
    y_NO: Tensor = activate(h_NF, experts.activation, experts.gated) @ down_EFO[e]
    return y_NO if down_bias_EO is None else y_NO + down_bias_EO[e].to(y_NO.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype autocast would choose: grouped_mm is not on its list (torch 2.13)."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _grouped_mm_takes(x_ND: Tensor, experts: Experts) -> bool:
    dtype = _compute_dtype(x_ND)
    rows = (experts.up_EDF.shape[1], experts.up_EDF.shape[2], *experts.down_EFO.shape[1:])
    return dtype in _GROUPED_DTYPES and all(row * dtype.itemsize % _GROUPED_STRIDE_BYTES == 0 for row in rows)
