"""Gated linear recurrences through recurrence.c: a custom operator that torch can differentiate, compile and export.

Shapes: B batch, L length, G groups, H value heads, K channels of a key, V channels of a value. float32.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import call, pointer, rows
from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels.gated_delta.reference import Inputs

SOURCE = Path(__file__).resolve().with_name("recurrence.c")
MAX_KEY = 256  # key channels that recurrence.c is compiled for
_CHUNK = 64  # steps between kept states, which the backward computes again into a buffer of that many
_INTEGERS = "B L H share K D chunk by_channel threads q_b q_l q_g k_b k_l k_g v_b v_l v_h g_b g_l g_h do_b do_l do_h"
_POINTERS = "q k v g beta initial reset o final missed checkpoints dout dfinal dq dk dv dg dbeta dinitial"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor? initial_state, Tensor? reset"
_GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dinitial")
_Optional = Tensor | None


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


def compiled() -> Library:
    """Return the library of recurrence.c, or why there is none."""
    return library(SOURCE)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


def _ready(*tensors: _Optional) -> list[Any]:
    """Return the inputs as C reads them, copying only what must be."""
    strided = (0, 1, 2)  # q, k, v
    ready: list[Any] = [None if t is None else rows(t) if i in strided else t for i, t in enumerate(tensors)]
    log = ready[3]
    if log is not None and log.dim() == 4:
        ready[3] = rows(log)
    return ready[:4] + [None if t is None else t.contiguous() for t in ready[4:]]


def _arguments(q: Tensor, k: Tensor, v: Tensor, *rest: _Optional, scale: float) -> _Args:
    log, beta, initial, reset = rest
    batch, length, heads, width = v.shape
    strides: dict[str, int] = {}
    for name, tensor, head in (("q", q, "g"), ("k", k, "g"), ("v", v, "h")):
        strides |= dict(zip((f"{name}_b", f"{name}_l", f"{name}_{head}"), tensor.stride(), strict=False))
    if log is not None:
        steps = (0, 0, log.stride(0)) if log.dim() == 1 else log.stride()[:3]
        strides |= dict(zip(("g_b", "g_l", "g_h"), steps, strict=True))
    return _Args(
        B=batch, L=length, H=heads, share=heads // k.shape[2], K=k.shape[3], D=width, chunk=_CHUNK,
        by_channel=log is not None and log.dim() == 4, threads=threads(), scale=scale, **strides,
        q=pointer(q), k=pointer(k), v=pointer(v), g=pointer(log), beta=pointer(beta), initial=pointer(initial),
        reset=pointer(reset),
    )  # fmt: skip


def _empty_outputs(q: Tensor, v: Tensor, delta: bool, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, the final state, the missed values and the checkpoints, unwritten."""
    batch, length, heads, width = v.shape
    state, chunks = (q.shape[3], width), -(-length // _CHUNK)
    missed = v.new_empty(v.shape if delta and save else 0)
    checkpoints = v.new_empty((batch, heads, chunks, *state) if save else 0)
    return v.new_empty(v.shape), v.new_empty(batch, heads, *state), missed, checkpoints


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, scale, save = args
    q, k, v, log, beta, initial, reset = _ready(*tensors)
    outputs = o, final, missed, checkpoints = _empty_outputs(q, v, beta is not None, save)
    if o.numel() == 0:
        if initial is None:
            final.zero_()
        else:
            final.copy_(initial)
        return outputs
    arguments = _arguments(q, k, v, log, beta, initial, reset, scale=scale)
    arguments.o, arguments.final = pointer(o), pointer(final)
    if save:
        arguments.missed = pointer(missed) if beta is not None else None
        arguments.checkpoints = pointer(checkpoints)
    call(SOURCE, "hybridnas_gated_delta_forward", arguments)
    return outputs


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(args[0], args[2], args[4] is not None, args[-1])


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, scale, _, missed, checkpoints, dout, dfinal = args
    q, k, v, log, beta, initial, reset = _ready(*tensors)
    dout = rows(dout)
    if checkpoints.numel() == 0 and dout.numel():  # the operator was called directly, without save
        missed, checkpoints = torch.ops.hybridnas.gated_delta(*tensors, scale, True)[2:]
    batch, length, groups, size = q.shape
    heads = v.shape[2]
    by_head = (batch, length, heads, size)
    dq, dk, dv, dinitial = (v.new_empty(s) for s in (by_head, by_head, v.shape, (batch, heads, size, v.shape[3])))
    dlog = v.new_empty(0 if log is None else by_head if log.dim() == 4 else by_head[:3])
    dbeta = v.new_empty(0 if beta is None else by_head[:3])
    if dout.numel() == 0:  # no step was taken: the state's gradient passes through
        for gradient in (dq, dk, dv, dlog, dbeta, dinitial):
            gradient.zero_()
        if dfinal is not None:
            dinitial.copy_(dfinal)
    else:
        arguments = _arguments(q, k, v, log, beta, initial, reset, scale=scale)
        final = None if dfinal is None else dfinal.contiguous()
        arguments.missed, arguments.checkpoints = pointer(missed), pointer(checkpoints)
        arguments.dout, arguments.dfinal = pointer(dout), pointer(final)
        arguments.do_b, arguments.do_l, arguments.do_h = dout.stride()[:3]
        for name, gradient in zip(_GRADIENTS, (dq, dk, dv, dlog, dbeta, dinitial), strict=True):
            setattr(arguments, name, pointer(gradient))
        call(SOURCE, "hybridnas_gated_delta_backward", arguments)
    if groups != heads:
        dq, dk = (t.reshape(batch, length, groups, heads // groups, size).sum(3) for t in (dq, dk))
    if log is not None and log.dim() == 1:
        dlog = dlog.sum((0, 1))
    return dq, dk, dv, dlog, dbeta, dinitial


def _fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, log, beta = args[:5]
    shapes = [
        q.shape, k.shape, v.shape, (0,) if log is None else log.shape, (0,) if beta is None else beta.shape,
        (v.shape[0], v.shape[2], q.shape[3], v.shape[3]),
    ]  # fmt: skip
    return tuple(v.new_empty(shape) for shape in shapes)


register_differentiable_op(
    "gated_delta",
    f"{_INPUTS}, float scale, bool save",
    4,
    forward=_forward,
    fake=_fake,
    backward=_backward,
    fake_gradients=_fake_gradients,
    gradients=6,
    differentiable=2,
    device="cpu",
)


def gated_delta_native(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) in v's dtype and the final state (B, H, K, V) in float32; inputs narrower are widened."""
    given = inputs.floating
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    tensors = [None if t is None else t.float() for t in given]
    reset = None if inputs.seq_idx is None else boundaries(inputs.seq_idx).to(torch.uint8)
    o, final, _, _ = torch.ops.hybridnas.gated_delta(*tensors, reset, inputs.query_scale, save)
    return o.to(inputs.v.dtype), final
