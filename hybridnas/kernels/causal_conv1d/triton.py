"""The causal convolution on a GPU: the host's side of ``triton_kernels.py``, as a differentiable operator.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it.

Shapes: B batch, L length, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels._triton.launch import Tile, launch, near_rows
from hybridnas.kernels._triton.shapes import conv_rows
from hybridnas.kernels.causal_conv1d import triton_kernels as kernels
from hybridnas.kernels.causal_conv1d.reference import Inputs, final_state_of

_Optional = Tensor | None


def tiles(taps: int) -> list[Tile]:
    """Return the tiles to choose from; a thread holds 8, 4 or 2 numbers of each of 2K - 1 rows."""
    warps, numbers = ((4, 2, 8), 8) if taps <= 4 else ((4, 8), 4) if taps < 8 else ((4, 8), 2)
    return [Tile.of(w, BD=32 * w * numbers // conv_rows(taps)) for w in warps]


def _ready(x: Tensor, weight: Tensor, *rest: _Optional) -> list[Any]:
    """Return x, weight (K, D), bias, initial, document as the kernels read them."""
    return [near_rows(x), weight.t().contiguous(), *(None if t is None else t.contiguous() for t in rest)]


def _run(kernel: Any, rows: int, ready: list[Any], only: Tile | None, **arguments: Any) -> None:
    x, weight, bias, initial, document = ready
    (batch, length, channels), taps = x.shape, weight.shape[0]
    launch(
        kernel, lambda tile: batch * -(-rows // conv_rows(taps)) * -(-channels // tile["BD"]),
        tiles(taps) if only is None else [only], ("D", "K"), x.device,
        x=x, weight=weight, bias=bias, initial=initial, document=document, L=length, D=channels,
        x_b=x.stride(0), x_l=x.stride(1), K=taps, BL=conv_rows(taps), **arguments,
    )  # fmt: skip


def conv_forward(*tensors: Any, silu: bool, only: Tile | None = None) -> Tensor:
    """Return y (B, L, D) in x's dtype from x, weight (D, K), bias, initial_state, document (B, L) int32 or None."""
    ready = _ready(*tensors)
    y_BLD = torch.empty_like(ready[0], memory_format=torch.contiguous_format)
    _run(kernels.conv_forward, y_BLD.shape[1], ready, only, y=y_BLD, SILU=silu)
    return y_BLD


def conv_backward(*tensors: Any, dy: Tensor, silu: bool, only: Tile | None = None) -> tuple[Tensor, ...]:
    """Return the gradients of x, weight, bias, initial_state; the last is empty without a state."""
    ready, dy = _ready(*tensors), near_rows(dy)
    (batch, length, channels), taps = ready[0].shape, ready[1].shape[0]
    dx = torch.empty_like(ready[0], memory_format=torch.contiguous_format)
    parts = -(-(length + taps - 1) // conv_rows(taps))
    dweight = dx.new_empty((batch, parts, taps, channels), dtype=torch.float32)
    dbias, dinitial = torch.empty_like(dweight[:, :, 0]), dx.new_empty(0, dtype=torch.float32)
    if ready[3] is not None:
        dinitial = dinitial.new_empty(batch, taps - 1, channels)
    _run(
        kernels.conv_backward, length + taps - 1, ready, only, dy=dy, dy_b=dy.stride(0), dy_l=dy.stride(1),
        dx=dx, dweight=dweight, dbias=dbias, dinitial=dinitial, SILU=silu,
    )  # fmt: skip
    _, weight, bias, initial, _ = tensors
    return (
        dx,
        dweight.sum((0, 1)).t().to(weight.dtype).contiguous(),
        dbias.sum((0, 1)).to(torch.float32 if bias is None else bias.dtype),
        dinitial.to(dx.dtype if initial is None else initial.dtype),
    )


_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? document, bool silu"


def _forward(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return conv_forward(*args[:5], silu=args[5]) if x.numel() else torch.zeros_like(x)


def _fake(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return x.new_empty(x.shape)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, silu, dy = args
    if dy.numel():
        return conv_backward(*tensors, dy=dy, silu=silu)
    return tuple(torch.zeros_like(g) for g in _gradients_like(*tensors))


def _gradients_like(*tensors: Any) -> list[Tensor]:
    x, weight, bias, initial = tensors[:4]
    vector = x.new_empty(x.shape[2], dtype=torch.float32) if bias is None else bias
    likes = [x, weight, vector, x.new_empty(0) if initial is None else initial]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


register_differentiable_op(
    "causal_conv1d_triton",
    _INPUTS,
    1,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=lambda *args: tuple(_gradients_like(*args[:4])),
    gradients=4,
)


def conv_triton(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in x's dtype and the final state (B, K - 1, D), both differentiable."""
    x, weight, bias, activation, initial_state, seq_idx = inputs
    document = None if seq_idx is None else boundaries(seq_idx).cumsum(1, dtype=torch.int32)
    y_BLD = torch.ops.hybridnas.causal_conv1d_triton(x, weight, bias, initial_state, document, activation == "silu")
    return y_BLD, final_state_of(x, weight.shape[1], initial_state, seq_idx)
