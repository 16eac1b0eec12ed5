"""State-space duality on a GPU as a differentiable operator; ``triton_host.py`` launches its kernels.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it.

Shapes: B batch, L length, H heads, P channels of a head, G groups, N state size, C chunks of T steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._triton.shapes import SSD_CHUNKS, power_of_two
from hybridnas.kernels.ssd.triton_host import Inputs, Kept, ssd_backward, ssd_forward

_Optional = Tensor | None
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? document, bool softplus, int chunk"
)


def _final_of(x: Tensor, B: Tensor, initial: _Optional) -> Tensor:
    """Return the state after no step."""
    final = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32)
    return final if initial is None else final.copy_(initial)


@torch.library.custom_op(
    "hybridnas::ssd_triton", mutates_args=(), schema=f"({_INPUTS}) -> ({', '.join(['Tensor'] * 8)})"
)
def _forward_op(*args: Any) -> tuple[Tensor, ...]:
    *tensors, softplus, chunk = args
    x, B, initial = tensors[0], tensors[3], tensors[8]
    if x.numel() and B.numel():
        y, final, kept = ssd_forward(Inputs.of(*tensors, softplus=softplus, chunk=chunk))
        return y.view(x.shape), final, *kept
    y, _, *kept_ = _shapes(*args)
    return y.zero_(), _final_of(x, B, initial), *(t.zero_() for t in kept_)


@_forward_op.register_fake
def _shapes(*args: Any) -> tuple[Tensor, ...]:
    x, B, z, chunk = args[0], args[3], args[6], args[-1]
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    chunks = (length + chunk - 1) // chunk

    def buffer(*shape: int) -> Tensor:
        empty: Tensor = x.new_empty(shape, dtype=torch.float32)
        return empty

    lines = (buffer(batch, heads, chunks * chunk) for _ in range(3))
    scores, states = buffer(batch, chunks, groups, chunk, chunk), buffer(batch, chunks, heads, width, size)
    ungated = x.new_empty(0) if z is None else x.new_empty(batch, length, heads * width)
    return x.new_empty(x.shape), buffer(batch, heads, width, size), *lines, scores, states, ungated


_KEPT = ", ".join(f"Tensor {name}" for name in Kept._fields)


@torch.library.custom_op(
    "hybridnas::ssd_triton_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, {_KEPT}, Tensor dy, Tensor? dfinal) -> ({', '.join(['Tensor'] * 9)})",
)
def _backward_op(*args: Any) -> tuple[Tensor, ...]:
    tensors, softplus, chunk, kept, dy, dfinal = args[:10], args[10], args[11], Kept(*args[12:18]), *args[18:]
    likes = _gradients_like(*tensors)
    if dy.numel() and tensors[3].numel():
        found = ssd_backward(Inputs.of(*tensors, softplus=softplus, chunk=chunk), kept, dy.flatten(2), dfinal)
        return tuple(g.to(like.dtype).view(like.shape) for g, like in zip(found, likes, strict=True))
    if dfinal is not None:  # nothing was scanned: the state's gradient passes through
        likes[-1] = dfinal.to(likes[-1].dtype, copy=True)
    return *(like.zero_() for like in likes[:-1]), likes[-1] if dfinal is not None else likes[-1].zero_()


def _gradients_like(*tensors: Any) -> list[Tensor]:
    """Return tensors of the nine gradients' shapes and dtypes."""
    x, dt, A, B, C, D, z, bias, initial = tensors[:9]
    vector = x.new_empty(A.shape, dtype=torch.float32)
    state = x.new_empty(x.shape[0], *x.shape[2:], B.shape[3], dtype=torch.float32)
    rest = (vector if D is None else D, x.new_empty(0) if z is None else z, vector if bias is None else bias)
    likes = [x, dt, A, B, C, *rest, state if initial is None else initial]
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes]


@_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(_gradients_like(*args[:9]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.chunk = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx: Any, dy: _Optional, dfinal: _Optional, *_: Any) -> tuple[_Optional, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[:10], saved[10:]
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    op = torch.ops.hybridnas.ssd_triton_backward
    found = op(*tensors, ctx.softplus, ctx.chunk, *kept, dy, dfinal)
    return (*(None if t is None else g for t, g in zip(tensors[:9], found, strict=True)), None, None, None)


torch.library.register_autograd("hybridnas::ssd_triton", _backward, setup_context=_setup)


def chunk_of(chunk_size: int) -> int:
    """Return the steps of a chunk that run for a ``chunk_size`` that was asked for."""
    least, most = SSD_CHUNKS
    return min(max(least, power_of_two(chunk_size)), most)


def documents(seq_idx_BL: Tensor, chunk: int) -> Tensor:
    """Return each step's document (B, CT) int32, counted from 0 in its row; what the last chunk lacks is the last."""
    number_BL = boundaries(seq_idx_BL).cumsum(1, dtype=torch.int32)
    missing = -seq_idx_BL.shape[1] % chunk
    return torch.cat([number_BL, number_BL[:, -1:].expand(-1, missing)], 1)


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: _Optional = None,
    z: _Optional = None,
    dt_bias: _Optional = None,
    dt_softplus: bool = False,
    initial_state: _Optional = None,
    seq_idx: _Optional = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in float32, both differentiable."""
    chunk = chunk_of(chunk_size)
    document = None if seq_idx is None else documents(seq_idx, chunk)
    op = torch.ops.hybridnas.ssd_triton
    y, final, *_ = op(x, dt, A, B, C, D, z, dt_bias, initial_state, document, dt_softplus, chunk)
    return y, final
