"""The selective scan through scan.c: a custom operator that torch can differentiate, compile and export.

Shapes: B batch, L length, D channels, N state size. float32; last dimension of every wide input contiguous.
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
from hybridnas.kernels.selective_scan.reference import Inputs

SOURCE = Path(__file__).resolve().with_name("scan.c")
_TILE = 16  # channels side by side, as in vectors.h
_Args = struct(
    "_Args",
    "B L D N chunk group batch_blocks softplus threads u_b u_l dt_b dt_l B_b B_l C_b C_l z_b z_l dy_b dy_l",
    "u dt A Bm Cm D_skip z bias h0 reset y final checkpoints dy dfinal du ddt dA dB dC dD dz dbias dh0",
)
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "Tensor? initial_state, Tensor? reset"
)
_OUTPUTS = ("du", "ddt", "dA", "dB", "dC", "dD", "dz", "dbias", "dh0")
_Optional = Tensor | None


def compiled() -> Library:
    """Return the library of scan.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def _chunk(size: int) -> int:
    """Steps between kept states: few enough for the first-level cache, many enough to keep little."""
    return 32 if size <= 16 else 64 if size <= 64 else 128


def _arguments(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: _Optional, softplus: bool
) -> ctypes.Structure:
    D, z, bias, initial, reset = rest
    batch, length, channels = u.shape
    blocks, tiles, group = min(batch, 64), -(-channels // _TILE), 16
    while group > 2 and blocks * -(-tiles // group) < 8:  # enough units for the threads of a larger machine
        group //= 2
    strides = {}
    for name, tensor in (("u", u), ("dt", delta), ("B", B), ("C", C), ("z", z)):
        if tensor is not None:
            strides[f"{name}_b"], strides[f"{name}_l"] = tensor.stride()[:2]
    return _Args(
        B=batch, L=length, D=channels, N=A.shape[1], chunk=_chunk(A.shape[1]), group=group, batch_blocks=blocks,
        softplus=softplus, threads=threads(), **strides,
        u=pointer(u), dt=pointer(delta), A=pointer(A), Bm=pointer(B), Cm=pointer(C), D_skip=pointer(D), z=pointer(z),
        bias=pointer(bias), h0=pointer(initial), reset=pointer(reset),
    )  # fmt: skip


def _ready(*tensors: _Optional) -> list[Any]:
    """Return u, delta, A, B, C, D, z, bias, initial_state, reset as C reads them, copying only what must be."""
    strided = (0, 1, 3, 4, 6)  # u, delta, B, C, z
    return [None if t is None else rows(t) if i in strided else t.contiguous() for i, t in enumerate(tensors)]


def _empty_checkpoints(u: Tensor, A: Tensor) -> Tensor:
    size = A.shape[1]
    return u.new_empty(u.shape[0], -(-u.shape[1] // _chunk(size)), -(-u.shape[2] // _TILE), size, _TILE)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, softplus, save = args
    ready = _ready(*tensors)
    u, A = ready[0], ready[2]
    y_BLD = u.new_empty(u.shape)  # new_empty: float32 as C writes it, whatever torch's default dtype is
    final_BDN = u.new_empty(u.shape[0], *A.shape)
    checkpoints = _empty_checkpoints(u, A) if save else u.new_empty(0)
    arguments = _arguments(*ready, softplus=softplus)
    arguments.y, arguments.final = pointer(y_BLD), pointer(final_BDN)
    arguments.checkpoints = pointer(checkpoints) if save else None
    call(SOURCE, "hybridnas_scan_forward", arguments)
    return y_BLD, final_BDN, checkpoints


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    u, A, save = args[0], args[2], args[-1]
    checkpoints = _empty_checkpoints(u, A) if save else u.new_empty(0)
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape), checkpoints


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus, _, checkpoints, dy, dfinal = args
    ready = _ready(*tensors)
    dy = rows(dy)
    if checkpoints.numel() == 0 and dy.numel():  # the operator was called directly, without save
        checkpoints = torch.ops.hybridnas.selective_scan(*tensors, softplus, True)[2]
    gradients = tuple(dy.new_empty(g.shape) for g in _gradient_shapes(*tensors))
    if dy.numel() == 0:  # nothing was scanned: the state's gradient passes through
        for gradient in gradients:
            gradient.zero_()
        if dfinal is not None:
            gradients[-1].copy_(dfinal)
        return gradients
    arguments = _arguments(*ready, softplus=softplus)
    arguments.checkpoints, arguments.dy = pointer(checkpoints), pointer(dy)
    arguments.dy_b, arguments.dy_l = dy.stride()[:2]
    final = None if dfinal is None else dfinal.contiguous()
    arguments.dfinal = pointer(final)
    for name, gradient in zip(_OUTPUTS, gradients, strict=True):
        setattr(arguments, name, pointer(gradient))
    call(SOURCE, "hybridnas_scan_backward", arguments)
    return gradients


def _gradient_shapes(*tensors: Any) -> list[Tensor]:
    """Return tensors shaped like the nine gradients; z's is empty without z."""
    u, delta, A, B, C, _, z = tensors[:7]
    vector = u.new_empty(1).expand(u.shape[2])
    state = u.new_empty(1).expand(u.shape[0], *A.shape)
    return [u, delta, A, B, C, vector, u.new_empty(0) if z is None else z, vector, state]


def _fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    return tuple(args[0].new_empty(g.shape) for g in _gradient_shapes(*args[:10]))


register_differentiable_op(
    "selective_scan",
    f"{_INPUTS}, bool softplus, bool save",
    3,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=_fake_gradients,
    gradients=9,
    differentiable=2,
    device="cpu",
)


def scan_native(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype and the final state (B, D, N) in float32; inputs narrower are widened."""
    given = inputs.floating
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    tensors = [None if t is None else t.float() for t in given]
    reset = None if inputs.seq_idx is None else boundaries(inputs.seq_idx).to(torch.uint8)
    y_BLD, final_BDN, _ = torch.ops.hybridnas.selective_scan(*tensors, reset, inputs.delta_softplus, save)
    return y_BLD.to(inputs.u.dtype), final_BDN
