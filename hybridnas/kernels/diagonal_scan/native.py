"""The scan of a diagonal recurrence through scan.c: an operator that torch can differentiate, compile and export.

Shapes: P planes (1, or real and imaginary part), B batch, L length, D channels. float32; last dimension contiguous.
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
from hybridnas.kernels.diagonal_scan.reference import Inputs

SOURCE = Path(__file__).resolve().with_name("scan.c")
_Args = struct(
    "_Args",
    "P B L D threads a_p a_b a_l x_p x_b x_l dh_p dh_b dh_l",
    "a x initial reset h dh da dx dinitial",
)
_INPUTS = "Tensor x, Tensor a, Tensor? initial_state, Tensor? reset"
_Optional = Tensor | None


def compiled() -> Library:
    """Return the library of scan.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def _arguments(x: Tensor, a: Tensor, initial: _Optional, reset: _Optional) -> ctypes.Structure:
    planes, batch, length, channels = x.shape
    return _Args(
        P=planes, B=batch, L=length, D=channels, threads=threads(), a_p=a.stride(0), a_b=a.stride(1), a_l=a.stride(2),
        x_p=x.stride(0), x_b=x.stride(1), x_l=x.stride(2), a=pointer(a), x=pointer(x), initial=pointer(initial),
        reset=pointer(reset),
    )  # fmt: skip


def _ready(x: Tensor, a: Tensor, *rest: _Optional) -> list[Any]:
    return [rows(x), rows(a), *(None if t is None else t.contiguous() for t in rest)]


def _forward(*args: Any) -> Tensor:
    ready = _ready(*args)  # kept until C has read it
    h: Tensor = ready[0].new_empty(args[0].shape)
    arguments = _arguments(*ready)
    arguments.h = pointer(h)
    call(SOURCE, "hybridnas_diagonal_forward", arguments)
    return h


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    ready, h, dh = _ready(*args[:4]), args[4], rows(args[5])
    x, _, initial, _ = ready
    dx, da = x.new_empty(x.shape), x.new_empty(x.shape)
    dinitial = x.new_empty(0 if initial is None else initial.shape)
    arguments = _arguments(*ready)
    arguments.h, arguments.dh = pointer(h), pointer(dh)
    arguments.dh_p, arguments.dh_b, arguments.dh_l = dh.stride()[:3]
    arguments.dx, arguments.da, arguments.dinitial = pointer(dx), pointer(da), pointer(dinitial)
    call(SOURCE, "hybridnas_diagonal_backward", arguments)
    return dx, da, dinitial


def fake_gradients(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty gradients of x, a and the initial state."""
    x, a, initial = args[:3]
    return x.new_empty(x.shape), a.new_empty(a.shape), x.new_empty(0 if initial is None else initial.shape)


register_differentiable_op(
    "diagonal_scan",
    _INPUTS,
    1,
    forward=_forward,
    fake=lambda *args: args[0].new_empty(args[0].shape),
    backward=_backward,
    fake_gradients=fake_gradients,
    gradients=3,
    keep_first=True,
    device="cpu",
)


def to_planes(tensor: Tensor) -> Tensor:
    """Return a real tensor as (1, ...) and a complex one as (2, ...), in float32."""
    if tensor.is_complex():
        narrow = tensor.to(torch.complex64)
        return torch.stack([narrow.real, narrow.imag])
    return tensor.float().unsqueeze(0)


def from_planes(planes: Tensor) -> Tensor:
    """Return what :func:`to_planes` was given, in float32 or complex64."""
    return planes[0] if planes.shape[0] == 1 else torch.complex(planes[0], planes[1])


def scan_native(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return h (B, L, D) in x's dtype and the final state (B, D); inputs narrower than float32 are widened."""
    return run_planes(inputs, torch.ops.hybridnas.diagonal_scan)


def run_planes(inputs: Inputs, operator: Any) -> tuple[Tensor, Tensor]:
    """Return h and the final state by an operator on planes: (x, a, initial state, reset) -> h."""
    a, x, initial_state, seq_idx = inputs
    reset = None if seq_idx is None else boundaries(seq_idx).to(torch.uint8)
    initial = None if initial_state is None else to_planes(initial_state)
    h_BLD = from_planes(operator(to_planes(x), to_planes(a), initial, reset))
    return h_BLD.to(x.dtype), h_BLD[:, -1] if x.shape[1] else inputs.first
