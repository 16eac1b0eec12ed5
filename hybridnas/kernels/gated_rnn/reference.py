"""GRU and LSTM, step by step: the specification.

Shapes: B batch, L length, D inputs, H hidden channels, G gates.

    GRU    r, z = sigmoid(W x + b + U h + c);  n = tanh(W x + b + r (U h + c));  h = (1 - z) n + z h
    LSTM   i, f, o = sigmoid(W x + b + U h + c);  g = tanh(likewise);  c = f c + i g;  h = o tanh(c)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import state_dtype

GATES = {"gru": 3, "lstm": 4}


class Inputs(NamedTuple):
    """The arguments of a recurrent network, in the order of ``gated_rnn``."""

    x: Tensor  # (B, L, D)
    weight_ih: Tensor  # (G H, D)
    weight_hh: Tensor  # (G H, H)
    bias_ih: Tensor | None = None  # (G H,)
    bias_hh: Tensor | None = None  # (G H,)
    initial_state: tuple[Tensor, ...] | None = None  # (B, H) each
    kind: str = "gru"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state and of all sums."""
        return state_dtype(self.x, self.weight_ih, self.weight_hh)

    @property
    def tensors_of_state(self) -> int:
        """How many tensors the state has."""
        return 2 if self.kind == "lstm" else 1

    @property
    def first(self) -> tuple[Tensor, ...]:
        """The state before the first step."""
        if self.initial_state is not None:
            return tuple(tensor.to(self.dtype) for tensor in self.initial_state)
        shape = (self.x.shape[0], self.weight_hh.shape[1])
        return tuple(self.x.new_zeros(shape, dtype=self.dtype) for _ in range(self.tensors_of_state))

    @property
    def nothing(self) -> Tensor:
        """An empty output that depends on all inputs."""
        weights = [t for t in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh) if t is not None]
        total = torch.stack([t.sum() for t in (self.x, *weights)]).sum()
        return self.x.new_empty(*self.x.shape[:2], self.weight_hh.shape[1]) + total.to(self.x.dtype)


def rnn_reference(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return h (B, L, H) in x's dtype and the final state, one step at a time, by plain autograd."""
    x, *given, _, kind = inputs
    state = inputs.first
    if not x.numel():
        return inputs.nothing, state
    W, U, b, c = (None if t is None else t.to(inputs.dtype) for t in given)
    assert W is not None and U is not None
    outputs = []
    for x_BD in x.to(inputs.dtype).unbind(1):
        left, right = F.linear(x_BD, W, b), F.linear(state[0], U, c)
        if kind == "gru":
            (r, z, n), (r_h, z_h, n_h) = left.chunk(3, 1), right.chunk(3, 1)
            z_BH = (z + z_h).sigmoid()
            state = ((1 - z_BH) * torch.tanh(n + (r + r_h).sigmoid() * n_h) + z_BH * state[0],)
        else:
            i, f, g, o = (left + right).chunk(4, 1)
            cell_BH = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = (o.sigmoid() * cell_BH.tanh(), cell_BH)
        outputs.append(state[0])
    return torch.stack(outputs, 1).to(x.dtype), state
