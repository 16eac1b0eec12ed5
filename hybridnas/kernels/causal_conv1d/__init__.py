"""The causal depthwise convolution of Mamba, with SiLU, forward and backward, channel-last.

Shapes: B batch, L length, D channels, K taps. ``reference.py`` is the specification; ``cpu.py`` with
``conv.c`` is the fast path on a processor, ``triton.py`` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.errors import KernelInputError
from hybridnas.hardware import Impl
from hybridnas.kernels._inputs import empty_result, require_seq_idx, require_tensor, state_dtype
from hybridnas.kernels._triton.choose import choose, takes_dtypes, words
from hybridnas.kernels._triton.shapes import MAX_TAPS
from hybridnas.kernels.causal_conv1d import cpu
from hybridnas.kernels.causal_conv1d.reference import conv_reference, final_state_of, padded

_NAME = "causal_conv1d"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y (B, L, D), each channel filtered by its own K causal taps, then SiLU when ``activation='silu'``.

    x (B, L, D); weight (D, K), last tap on the present; bias (D,); states (B, K - 1, D): the inputs before x.
    ``seq_idx`` (B, L) integers: no tap reaches over a change of it. All floating inputs are differentiable. With
    ``return_final_state`` the result is (y, the last K - 1 inputs). ``impl``: auto, reference, cpu (C on a processor,
    F.conv1d elsewhere) or triton; auto on a CUDA device is triton, torch for float64 and K > 8.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: the authors' ``causal_conv1d`` (arXiv 2312.00752, figure 3).
    """
    _check(x, weight, bias, activation, initial_state, seq_idx)
    takes = takes_dtypes(x, weight, bias, initial_state) and weight.shape[1] <= MAX_TAPS
    run = _form(choose(_NAME, impl, x.device, takes=takes), x, weight, seq_idx)
    y_BLD, final_BKD = run(x, weight, bias, activation, initial_state, seq_idx)
    return (y_BLD, final_BKD) if return_final_state else y_BLD


def describe(device: torch.device | str) -> str:
    """Return words on what computes the convolution on ``device``."""
    if torch.device(device).type == "cuda":
        return words(device, "F.conv1d")
    library = cpu.compiled()
    return library.words if library.handle is not None else f"torch, F.conv1d: {library.words}"


def _form(chosen: Impl, x: Tensor, weight: Tensor, seq_idx: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that runs: C does float32 sums only; F.conv1d cannot mask taps of packed documents."""
    if chosen is Impl.REFERENCE:
        return conv_reference
    if chosen is Impl.TRITON:
        from hybridnas.kernels.causal_conv1d.triton import conv_triton

        return conv_triton
    fits = x.device.type == "cpu" and state_dtype(x, weight) == torch.float32 and weight.shape[1] <= cpu.MAX_TAPS
    if fits and cpu.available():
        return cpu.conv_c
    return _conv_torch if seq_idx is None else conv_reference


def _conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """F.conv1d over a padded copy; packed documents go through the reference, whose taps can be masked."""
    taps = weight.shape[1]
    if x.shape[1] == 0:  # F.conv1d refuses an input shorter than its kernel
        y_BLD = empty_result(x.shape, x, weight, bias)
        return y_BLD, final_state_of(x, taps, initial_state, seq_idx)
    x_BDL = padded(x, taps, initial_state).transpose(1, 2)
    kernel = weight.to(x.dtype).unsqueeze(1)
    y_BDL = F.conv1d(x_BDL, kernel, None if bias is None else bias.to(x.dtype), groups=weight.shape[0])
    y_BLD = y_BDL.transpose(1, 2)
    if activation == "silu":
        y_BLD = F.silu(y_BLD)
    return y_BLD.contiguous(), final_state_of(x, taps, initial_state, seq_idx)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    device = x.device
    require_tensor(_NAME, "x", x, "(B, L, D)", tuple(x.shape) if x.dim() == 3 else (0, 0, 0), device)
    batch, length, channels = x.shape
    taps = weight.shape[1] if weight.dim() == 2 else 0
    require_tensor(_NAME, "weight", weight, "(D, K)", (channels, taps), device)
    if taps < 1:
        raise KernelInputError(f"{_NAME} weight must have at least one tap (D, K), got shape {tuple(weight.shape)}")
    if bias is not None:
        require_tensor(_NAME, "bias", bias, "(D,)", (channels,), device)
    if activation not in (None, "silu"):
        raise KernelInputError(f"{_NAME} activation must be None or 'silu', got {activation!r}")
    if initial_state is not None:
        require_tensor(_NAME, "initial_state", initial_state, "(B, K - 1, D)", (batch, taps - 1, channels), device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), device)
