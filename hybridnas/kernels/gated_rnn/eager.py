"""GRU and LSTM by torch's own operators, in float32 or float64. Shapes: B batch, L length, H hidden channels."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.kernels.gated_rnn.reference import Inputs


def rnn_eager(inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return h (B, L, H) in x's dtype and the final state."""
    x, weight_ih, weight_hh, bias_ih, bias_hh, _, kind = inputs
    first = inputs.first
    if not x.numel():
        return inputs.nothing, first
    biases = [] if bias_ih is None or bias_hh is None else [bias_ih, bias_hh]
    weights = [t.to(inputs.dtype) for t in (weight_ih, weight_hh, *biases)]
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    options = (bool(biases), 1, 0.0, False, False, True)
    x_BLD, hidden_1BH = x.to(inputs.dtype), [t[None].contiguous() for t in first]
    if kind == "gru":
        h_BLH, final_1BH = torch.gru(x_BLD, hidden_1BH[0], weights, *options)
        return h_BLH.to(x.dtype), (final_1BH[0],)
    h_BLH, final_1BH, cell_1BH = torch.lstm(x_BLD, hidden_1BH, weights, *options)
    return h_BLH.to(x.dtype), (final_1BH[0], cell_1BH[0])
