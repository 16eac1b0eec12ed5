"""The scan of a diagonal linear recurrence, h_t = a_t h_{t-1} + x_t, real or complex, forward and backward.

Shapes: B batch, L length, D channels. ``reference.py`` is the specification, ``eager.py`` the associative form in plain
torch, ``native.py`` with ``scan.c`` the one on a CPU, ``triton.py`` the one on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_seq_idx
from hybridnas.kernels.diagonal_scan import native
from hybridnas.kernels.diagonal_scan.eager import scan_eager
from hybridnas.kernels.diagonal_scan.reference import Inputs, scan_reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
OPERATION = Operation(
    "diagonal_scan",
    "an associative scan",
    native=native.compiled,
    native_available=native.available,
    native_dtypes=_DTYPES,
    triton=True,
    triton_dtypes=_DTYPES,
)
describe = OPERATION.describe
_NAME = OPERATION.name


def diagonal_scan(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return h (B, L, D) of h_t = a_t h_{t-1} + x_t, in x's dtype.

    a, x (B, L, D), all real or all complex; states (B, D), float32 or complex64 whatever the inputs (float64 and
    complex128 for those). ``seq_idx`` (B, L) integers: the state restarts from zero where it changes along L, and a has
    no gradient there. All floating inputs are differentiable. With ``return_final_state`` the result is (h, the state
    after the last step). ``impl``: see ``Impl``. native and triton sum in float32, do not take double precision, and
    can be differentiated once. Source: Martin and Cundy 2018, arXiv 1709.04057, equation 5.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation that
    cannot run here.
    """
    inputs = Inputs(a, x, initial_state, seq_idx)
    _check(inputs)
    chosen = OPERATION.choose(impl, x.device, dtypes_of(a, x, initial_state))
    with full_precision(x.device):
        if chosen is Impl.NATIVE:
            h_BLD, final_BD = native.scan_native(inputs)
        elif chosen is Impl.TRITON:
            from hybridnas.kernels.diagonal_scan.triton import scan_triton

            h_BLD, final_BD = scan_triton(inputs)
        else:
            h_BLD, final_BD = scan_reference(inputs) if chosen is Impl.REFERENCE else scan_eager(inputs)
    return (h_BLD, final_BD) if return_final_state else h_BLD


def _check(inputs: Inputs) -> None:
    a, x, initial_state, seq_idx = inputs
    wide = tuple(x.shape) if x.dim() == 3 else (0, 0, 0)
    given: list[tuple[str, Tensor, str, tuple[int, ...]]] = [("x", x, "(B, L, D)", wide), ("a", a, "(B, L, D)", wide)]
    if initial_state is not None:
        given.append(("initial_state", initial_state, "(B, D)", (wide[0], wide[2])))
    for name, tensor, letters, shape in given:
        got = tuple(tensor.shape)
        if tensor.dim() != len(shape):
            must = f"must have {len(shape)} dimensions {letters}, got shape {got}"
            raise refused(_NAME, name, must, got, letters)
        if got != shape:
            raise refused(_NAME, name, f"must have shape {letters} = {shape}, got {got}", got, shape)
        if not (tensor.is_complex() if x.is_complex() else tensor.is_floating_point()):
            kind = "complex like x" if x.is_complex() else "floating point, and complex where x is"
            raise refused(_NAME, name, f"must be {kind}, got {tensor.dtype}", tensor.dtype, kind)
        if tensor.device != x.device:
            must = f"must be on {x.device} like x, got {tensor.device}"
            raise refused(_NAME, name, must, tensor.device, x.device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, wide[:2], x.device)
