"""Routed experts, token by token: the specification of the other implementations.

Shapes: N tokens in batch-then-time order, D input width, F hidden width, O output width, E experts, K choices a token,
C slots an expert. A gated expert holds its two first matrices side by side: (E, D, 2F), gate first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import empty_result
from hybridnas.kernels.activations import activate


class Experts(NamedTuple):
    """The weights of E feed-forward experts, stacked, and how they compute."""

    up_EDF: Tensor  # first matrices (E, D, F), or (E, D, 2F) when gated
    down_EFO: Tensor  # second matrices (E, F, O)
    up_bias_EF: Tensor | None = None
    down_bias_EO: Tensor | None = None
    activation: str = "relu"
    gated: bool = False


def expert_forward(x_D: Tensor, experts: Experts, e: int) -> Tensor:
    """Return expert ``e`` of one token: (D,) -> (O,)."""
    h = x_D @ experts.up_EDF[e]
    if experts.up_bias_EF is not None:
        h = h + experts.up_bias_EF[e]
    y = activate(h, experts.activation, experts.gated) @ experts.down_EFO[e]
    return y if experts.down_bias_EO is None else y + experts.down_bias_EO[e]


def no_tokens(x_ND: Tensor, gate: Tensor, experts: Experts) -> Tensor:
    """Return the output (0, O) of no tokens, which still gives every weight a gradient of its shape."""
    shape = (0, experts.down_EFO.shape[2])
    return empty_result(shape, x_ND, gate, *(t for t in experts if isinstance(t, Tensor)))


def token_choice_reference(
    x_ND: Tensor, gate_NK: Tensor, expert_NK: Tensor, experts: Experts, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """Loop over tokens: an expert that has taken ``capacity`` of them adds nothing for later ones."""
    y_NO = x_ND.new_zeros(x_ND.shape[0], experts.down_EFO.shape[2])
    counts = [0] * experts.up_EDF.shape[0]
    rows = []
    for n in range(x_ND.shape[0]):
        y_O = y_NO[n]
        for j in range(expert_NK.shape[1]):
            e = int(expert_NK[n, j])
            if capacity is None or counts[e] < capacity:
                y_O = y_O + gate_NK[n, j].to(x_ND.dtype) * expert_forward(x_ND[n], experts, e)
            counts[e] += 1
        rows.append(y_O)
    y_NO = torch.stack(rows) if rows else no_tokens(x_ND, gate_NK, experts)
    return y_NO, torch.tensor(counts, device=x_ND.device)


def expert_choice_reference(x_ND: Tensor, gate_EC: Tensor, token_EC: Tensor, experts: Experts) -> Tensor:
    """Loop over experts and the tokens that each has picked."""
    rows = [x_ND.new_zeros(experts.down_EFO.shape[2]) for _ in range(x_ND.shape[0])]
    for e in range(token_EC.shape[0]):
        for c in range(token_EC.shape[1]):
            n = int(token_EC[e, c])
            rows[n] = rows[n] + gate_EC[e, c].to(x_ND.dtype) * expert_forward(x_ND[n], experts, e)
    return torch.stack(rows) if rows else no_tokens(x_ND, gate_EC, experts)
