"""The scan of a diagonal recurrence on a GPU: the host's side of ``triton_kernels.py``, as a differentiable operator.

Imports triton at its top: import this module where a CUDA tensor, or the interpreter, asks for it.

Shapes: P planes (1, or real and imaginary part), B batch, L length, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybridnas.kernels._build.arguments import rows
from hybridnas.kernels._register import register_differentiable_op
from hybridnas.kernels._triton.launch import Tile, launch
from hybridnas.kernels.diagonal_scan import triton_kernels as kernels
from hybridnas.kernels.diagonal_scan.native import fake_gradients, run_planes
from hybridnas.kernels.diagonal_scan.reference import Inputs

TILES = [Tile.of(4, BL=32, BD=32), Tile.of(4, BL=64, BD=32), Tile.of(2, BL=32, BD=16)]
_Optional = Tensor | None


def _run(kernel: Any, like: Tensor, only: Tile | None, **arguments: Any) -> None:
    planes, batch, length, channels = like.shape
    launch(
        kernel, lambda tile: batch * -(-channels // tile["BD"]), TILES if only is None else [only], ("D",), like.device,
        L=length, D=channels, h_p=batch * length * channels, initial_p=batch * channels, COMPLEX=planes == 2,
        **arguments,
    )  # fmt: skip


def diagonal_forward(x: Tensor, a: Tensor, initial: _Optional, reset: _Optional, *, only: Tile | None = None) -> Tensor:
    """Return h (P, B, L, D) in float32 from x, a (P, B, L, D), initial (P, B, D), reset (B, L) uint8 or None."""
    x, a = rows(x), rows(a)
    h = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _run(
        kernels.diagonal_forward, h, only, x=x, a=a, initial=None if initial is None else initial.contiguous(),
        reset=None if reset is None else reset.contiguous(), h=h, x_p=x.stride(0), x_b=x.stride(1), x_l=x.stride(2),
        a_p=a.stride(0), a_b=a.stride(1), a_l=a.stride(2),
    )  # fmt: skip
    return h


def diagonal_backward(
    x: Tensor, a: Tensor, initial: _Optional, reset: _Optional, h: Tensor, dh: Tensor, *, only: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, a and the initial state; the last is empty without one."""
    a, dh = rows(a), rows(dh)
    dx, da, dinitial = fake_gradients(x, a, initial)
    if not x.shape[2]:  # the kernel reads the first step's decay
        return dx, da, dinitial.zero_()
    _run(
        kernels.diagonal_backward, h, only, a=a, initial=None if initial is None else initial.contiguous(),
        reset=None if reset is None else reset.contiguous(), h=h, dh=dh, da=da, dx=dx, dinitial=dinitial,
        a_p=a.stride(0), a_b=a.stride(1), a_l=a.stride(2), dh_p=dh.stride(0), dh_b=dh.stride(1), dh_l=dh.stride(2),
    )  # fmt: skip
    return dx, da, dinitial


register_differentiable_op(
    "diagonal_scan_triton",
    "Tensor x, Tensor a, Tensor? initial_state, Tensor? reset",
    1,
    forward=diagonal_forward,
    fake=lambda *args: args[0].new_empty(args[0].shape),
    backward=diagonal_backward,
    fake_gradients=fake_gradients,
    gradients=3,
    keep_first=True,
)


def scan_triton(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return h (B, L, D) in x's dtype and the final state (B, D), both differentiable."""
    return run_planes(inputs, torch.ops.hybridnas.diagonal_scan_triton)
