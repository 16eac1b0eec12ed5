"""The causal convolution through conv.c: a custom operator that torch can differentiate, compile and export.

Shapes: B batch, L length, D channels, K taps. float32; last dimension of x contiguous.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import call, pointer, rows, struct
from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels.causal_conv1d.reference import Inputs, final_state_of

SOURCE = Path(__file__).resolve().with_name("conv.c")
MAX_TAPS = 16  # as in conv.c
_Args = struct(
    "_Args",
    "B L D K batch_blocks silu threads x_b x_l dy_b dy_l",
    "x weight bias initial reset y dy dx dweight dbias dinitial",
)
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? reset, bool silu"
_Optional = Tensor | None


def compiled() -> Library:
    """Return the library of conv.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def _arguments(ready: list[Any], silu: bool) -> ctypes.Structure:
    x, weight_KD, bias, initial, reset = ready
    batch, length, channels = x.shape
    return _Args(
        B=batch, L=length, D=channels, K=weight_KD.shape[0], batch_blocks=max(1, min(batch, 64)), silu=silu,
        threads=threads(), x_b=x.stride(0), x_l=x.stride(1), x=pointer(x), weight=pointer(weight_KD),
        bias=pointer(bias), initial=pointer(initial), reset=pointer(reset),
    )  # fmt: skip


def _ready(x: Tensor, weight: Tensor, *rest: _Optional) -> list[Any]:
    """Return the inputs as C reads them: taps first, everything but x contiguous."""
    return [rows(x), weight.t().contiguous(), *(None if t is None else t.contiguous() for t in rest)]


def _forward(*args: Any) -> Tensor:
    ready = _ready(*args[:5])
    y_BLD: Tensor = ready[0].new_empty(args[0].shape)  # float32 as C writes it, whatever torch's default dtype is
    arguments = _arguments(ready, args[5])
    arguments.y = pointer(y_BLD)
    call(SOURCE, "hybridnas_conv_forward", arguments)
    return y_BLD


def _fake(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return x.new_empty(x.shape)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ready, dy = _ready(*args[:5]), rows(args[6])
    x, weight_KD, _, initial, _ = ready
    dx, dweight_KD, dbias = x.new_empty(x.shape), x.new_empty(weight_KD.shape), x.new_empty(x.shape[2])
    # rows of the state that no tap reaches have no gradient, and the kernel does not visit them
    dinitial = x.new_zeros(0 if initial is None else initial.shape)
    arguments = _arguments(ready, args[5])
    arguments.dy, arguments.dy_b, arguments.dy_l = pointer(dy), dy.stride(0), dy.stride(1)
    arguments.dx, arguments.dweight, arguments.dbias = pointer(dx), pointer(dweight_KD), pointer(dbias)
    arguments.dinitial = pointer(dinitial)
    call(SOURCE, "hybridnas_conv_backward", arguments)
    return dx, dweight_KD.t().contiguous(), dbias, dinitial


def _fake_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, _, initial = args[:4]
    dinitial = x.new_empty(0) if initial is None else x.new_empty(initial.shape)
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(x.shape[2]), dinitial


register_differentiable_op(
    "causal_conv1d",
    _INPUTS,
    1,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=_fake_gradients,
    gradients=4,
    device="cpu",
)


def conv_native(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in x's dtype and the final state (B, K - 1, D); inputs narrower than float32 are widened."""
    x, weight, bias, activation, initial_state, seq_idx = inputs
    tensors = [None if t is None else t.float() for t in (x, weight, bias, initial_state)]
    reset = None if seq_idx is None else boundaries(seq_idx).to(torch.uint8)
    y_BLD = torch.ops.hybridnas.causal_conv1d(*tensors, reset, activation == "silu")
    return y_BLD.to(x.dtype), final_state_of(x, weight.shape[1], initial_state, seq_idx)
