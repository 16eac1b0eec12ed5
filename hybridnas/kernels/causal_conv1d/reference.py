"""The causal depthwise convolution, tap by tap: the specification.

Shapes: B batch, L length, D channels, K taps.

    y_t = act(bias + sum_k weight_k x_{t - (K - 1 - k)}),   x before the start is the initial state, or zero
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, state_dtype


class Inputs(NamedTuple):
    """The arguments of a convolution, in the order of ``causal_conv1d``."""

    x: Tensor  # (B, L, D)
    weight: Tensor  # (D, K)
    bias: Tensor | None = None  # (D,)
    activation: str | None = None  # None or "silu"
    initial_state: Tensor | None = None  # (B, K - 1, D)
    seq_idx: Tensor | None = None  # (B, L) integers


def padded(x_BLD: Tensor, taps: int, initial_state: Tensor | None) -> Tensor:
    """Return x with the K - 1 inputs before it in front: the state, or zeros; (B, K - 1 + L, D)."""
    if initial_state is None:
        return F.pad(x_BLD, (0, 0, taps - 1, 0))
    return torch.cat([initial_state.to(x_BLD.dtype), x_BLD], 1)


def document_of(seq_idx_BL: Tensor, taps: int) -> Tensor:
    """Return the document number of every padded position, (B, K - 1 + L); the state belongs to the first one."""
    return F.pad(boundaries(seq_idx_BL).long().cumsum(1), (taps - 1, 0))


def final_state_of(x_BLD: Tensor, taps: int, initial_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """Return the last K - 1 inputs, (B, K - 1, D), with zeros for those of documents before the last."""
    keep = taps - 1
    all_BLD = padded(x_BLD[:, max(x_BLD.shape[1] - keep, 0) :], taps, initial_state)
    last_BKD = all_BLD[:, all_BLD.shape[1] - keep :]
    if seq_idx is None:
        return last_BKD
    document = document_of(seq_idx, taps)
    same = document[:, document.shape[1] - keep :] == document[:, -1:]
    return torch.where(same[..., None], last_BKD, torch.zeros_like(last_BKD))


def conv_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) and the final state (B, K - 1, D), by shift and add; sums in float32 or wider."""
    x, weight, bias, activation, initial_state, seq_idx = inputs
    dtype, (length, taps) = state_dtype(x, weight), (x.shape[1], weight.shape[1])
    x_BLD = padded(x, taps, initial_state).to(dtype)
    document = None if seq_idx is None else document_of(seq_idx, taps)
    y_BLD = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype).expand(x.shape)
    for k, w_D in enumerate(weight.to(dtype).unbind(1)):
        shifted = x_BLD[:, k : k + length]
        if document is not None:
            same = document[:, k : k + length] == document[:, taps - 1 :]
            shifted = torch.where(same[..., None], shifted, torch.zeros_like(shifted))
        y_BLD = y_BLD + w_D * shifted
    if activation == "silu":
        y_BLD = F.silu(y_BLD)
    return y_BLD.to(x.dtype), final_state_of(x, taps, initial_state, seq_idx)
