"""The causal depthwise convolution by F.conv1d over a padded copy, on any device.

Shapes: B batch, L length, D channels, K taps.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels._inputs import empty_result
from hybridnas.kernels.causal_conv1d.reference import Inputs, conv_reference, final_state_of, padded


def conv_eager(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in x's dtype and the final state (B, K - 1, D).

    Packed documents go through the specification, whose taps can be masked and which is vectorized over L too.
    """
    x, weight, bias, activation, initial_state, seq_idx = inputs
    taps = weight.shape[1]
    if seq_idx is not None:
        return conv_reference(inputs)
    if x.shape[1] == 0:  # F.conv1d refuses an input shorter than its kernel
        return empty_result(x.shape, x, weight, bias), final_state_of(x, taps, initial_state, seq_idx)
    x_BDL = padded(x, taps, initial_state).transpose(1, 2)
    kernel = weight.to(x.dtype).unsqueeze(1)
    y_BDL = F.conv1d(x_BDL, kernel, None if bias is None else bias.to(x.dtype), groups=weight.shape[0])
    y_BLD = y_BDL.transpose(1, 2)
    if activation == "silu":
        y_BLD = F.silu(y_BLD)
    return y_BLD.contiguous(), final_state_of(x, taps, initial_state, seq_idx)
