"""Causal depthwise convolution of four taps with SiLU against F.conv1d, each in the layout it is written for.

Shapes: B batch, L length, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.kernels.causal_conv1d import causal_conv1d

OURS, TORCH = "ours", "F.conv1d + silu"


def ours(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    y_BLD = causal_conv1d(x_BLD, weight_DK, bias_D, activation="silu")
    assert isinstance(y_BLD, Tensor)
    return y_BLD


def torch_conv(x_BDL: Tensor, weight_DK: Tensor, bias_D: Tensor) -> Tensor:
    """As in Hugging Face and mamba: padded on both sides, cut, then SiLU; (B, D, L)."""
    y_BDL = F.conv1d(x_BDL, weight_DK[:, None], bias_D, padding=weight_DK.shape[1] - 1, groups=weight_DK.shape[0])
    return F.silu(y_BDL[..., : x_BDL.shape[2]])


def _forward(work: Callable[..., Tensor], inputs: Sequence[Tensor], _: Tensor) -> None:
    with torch.no_grad():
        work(*inputs)


def _forward_backward(work: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(work(*inputs), inputs, dy)


def run(config: BenchConfig) -> Result:
    """Measure forward and forward with backward; there is no goal."""
    result = Result("conv")
    for batch, channels, length in [(1, 16, 16)] if config.tiny else [(1, 1024, 1024), (8, 512, 256)]:
        x_BDL, dy_BDL = torch.randn(batch, channels, length), torch.randn(batch, channels, length)
        weights = [torch.randn(channels, 4, requires_grad=True), torch.randn(channels, requires_grad=True)]
        theirs = [x_BDL.requires_grad_(), *weights]
        own = [x_BDL.detach().transpose(1, 2).contiguous().requires_grad_(), *weights]
        with torch.no_grad():
            error = float((ours(*own).transpose(1, 2) - torch_conv(*theirs)).abs().max())
        if not error < 1e-4:
            raise AssertionError(f"the convolutions differ by {error:.1e}")
        dy_BLD = dy_BDL.transpose(1, 2).contiguous()
        for kind, work in (("fwd", _forward), ("fwd+bwd", _forward_backward)):
            case = f"(B,D,L)=({batch},{channels},{length}) {kind}"
            forms = [
                Form(OURS, partial(work, ours, own, dy_BLD)),
                Form(TORCH, partial(work, torch_conv, theirs, dy_BDL)),
            ]
            result.add(case, measure(forms, config.pick(25, 9, 1), shortest=config.pick(0.02, 0.01, 0.0)))
            result.ratio(case, TORCH, OURS)
    return result
