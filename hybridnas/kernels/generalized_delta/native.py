"""RWKV-7's recurrence through recurrence.c: a custom operator that torch can differentiate, compile and export.

Shapes: B batch, L length, H heads, K channels of a key, V channels of a value. float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import call, pointer, rows, struct
from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels.generalized_delta.reference import Inputs

SOURCE = Path(__file__).resolve().with_name("recurrence.c")
MAX_KEY = 256  # key channels that recurrence.c is compiled for
_CHUNK = 64  # steps between kept states, which the backward computes again into a buffer of that many
_STRIDED = "q k g a b v do"
_STRIDES = " ".join(f"{name}_b {name}_l {name}_h" for name in _STRIDED.split())
_INPUTS = ("q", "k", "g", "a", "b", "v", "initial", "reset")
_GRADIENTS = "dq dk dg da db dv dinitial"  # of the operator's inputs, in their order
_Args = struct(
    "_Args",
    f"B L H K D chunk threads {_STRIDES}",
    f"q k g a b v initial reset o final read checkpoints dout dfinal {_GRADIENTS}",
)


def compiled() -> Library:
    """Return the library of recurrence.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def _arguments(tensors: list[Any]) -> tuple[Any, list[Any]]:
    """Return the struct of the inputs, and the tensors that it points to, copied only where they must be."""
    *strided, initial, reset = tensors
    ready: list[Any] = [rows(t) for t in strided] + [None if t is None else t.contiguous() for t in (initial, reset)]
    q, v = ready[0], ready[5]
    given = dict(zip(_INPUTS, ready, strict=True))
    strides: dict[str, int] = {}
    for name in _STRIDED.split()[:-1]:
        strides |= dict(zip((f"{name}_b", f"{name}_l", f"{name}_h"), given[name].stride(), strict=False))
    batch, length, heads, width = v.shape
    sizes = {"B": batch, "L": length, "H": heads, "K": q.shape[3], "D": width, "chunk": _CHUNK, "threads": threads()}
    return _Args(**sizes, **strides, **{name: pointer(t) for name, t in given.items()}), ready


def _empty_outputs(q: Tensor, v: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, the final state, what was read and the checkpoints, unwritten."""
    batch, length, heads, width = v.shape
    state, chunks = (q.shape[3], width), -(-length // _CHUNK)
    read = v.new_empty(v.shape if save else 0)
    checkpoints = v.new_empty((batch, heads, chunks, *state) if save else 0)
    return v.new_empty(v.shape), v.new_empty(batch, heads, *state), read, checkpoints


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, save = args
    outputs = o, final, read, checkpoints = _empty_outputs(tensors[0], tensors[5], save)
    if o.numel() == 0:
        if tensors[6] is None:
            final.zero_()
        else:
            final.copy_(tensors[6])
        return outputs
    arguments, _kept = _arguments(tensors)
    arguments.o, arguments.final = pointer(o), pointer(final)
    if save:
        arguments.read, arguments.checkpoints = pointer(read), pointer(checkpoints)
    call(SOURCE, "hybridnas_generalized_delta_forward", arguments)
    return outputs


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(args[0], args[5], args[-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, _, read, checkpoints, dout, dfinal = args
    dout = rows(dout)
    if checkpoints.numel() == 0 and dout.numel():  # the operator was called directly, without save
        read, checkpoints = torch.ops.hybridnas.generalized_delta(*tensors, True)[2:]
    gradients = _fake_gradients(*args)
    if dout.numel() == 0:  # no step was taken: the state's gradient passes through
        for gradient in gradients:
            gradient.zero_()
        if dfinal is not None:
            gradients[6].copy_(dfinal)
        return gradients
    arguments, _kept = _arguments(tensors)
    final = None if dfinal is None else dfinal.contiguous()
    arguments.read, arguments.checkpoints = pointer(read), pointer(checkpoints)
    arguments.dout, arguments.dfinal = pointer(dout), pointer(final)
    arguments.do_b, arguments.do_l, arguments.do_h = dout.stride()[:3]
    for name, gradient in zip(_GRADIENTS.split(), gradients, strict=True):
        setattr(arguments, name, pointer(gradient))
    call(SOURCE, "hybridnas_generalized_delta_backward", arguments)
    return gradients


def _fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    q, v = args[0], args[5]
    state = (v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return tuple(v.new_empty(shape) for shape in (*[q.shape] * 5, v.shape, state))


register_differentiable_op(
    "generalized_delta",
    "Tensor q, Tensor k, Tensor log_decay, Tensor a, Tensor b, Tensor v, Tensor? initial, Tensor? reset, bool save",
    4,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=_fake_gradients,
    gradients=7,
    differentiable=2,
    device="cpu",
)


def generalized_delta_native(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V) in float32; inputs narrower are widened."""
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs.floating)
    q, k, v, log_decay, a, b, initial = (None if t is None else t.float() for t in inputs.floating)
    reset = None if inputs.seq_idx is None else boundaries(inputs.seq_idx).to(torch.uint8)
    o, final, _, _ = torch.ops.hybridnas.generalized_delta(q, k, log_decay, a, b, v, initial, reset, save)
    return o.to(inputs.v.dtype), final
