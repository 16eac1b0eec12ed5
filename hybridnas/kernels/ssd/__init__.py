"""State-space duality, the scan of Mamba-2 (arXiv 2405.21060), in matrix products, forward and backward.

Shapes: B batch, L length, H heads, P channels of a head, G groups, N state size. ``reference.py`` is the
specification; ``chunked.py`` is the fast path in torch's own matrix products, ``triton.py`` the one on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.errors import KernelInputError
from hybridnas.hardware import Impl
from hybridnas.kernels._inputs import full_precision, require_finite, require_seq_idx, require_tensor
from hybridnas.kernels._triton.choose import choose, takes_dtypes, words
from hybridnas.kernels.ssd.chunked import ssd_chunked
from hybridnas.kernels.ssd.reference import ssd_reference

_NAME = "ssd"


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y (B, L, H, P) of h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t^T, y_t = (h_t C_t + D x_t) silu(z_t).

    x, z (B, L, H, P); dt (B, L, H); A, D, dt_bias (H,), A not positive; B, C (B, L, G, N), G dividing H; states
    (B, H, P, N), float32 whatever the inputs (float64 for float64). ``seq_idx`` (B, L) integers: the state restarts
    where it changes. All floating inputs are differentiable. With ``return_final_state``: (y, last state).
    ``chunk_size`` [steps] trades matrix products for memory and does not change the result; triton takes 128 or 256.
    ``impl``: auto, reference, cpu (torch, on any device) or triton; auto on a CUDA device is triton, torch for float64.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: Dao and Gu 2024, section 6.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, chunk_size)
    takes = takes_dtypes(x, dt, A, B, C, D, z, dt_bias, initial_state)
    chosen = choose(_NAME, impl, x.device, takes=takes)
    with full_precision(x.device):
        given = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx)
        if chosen is Impl.REFERENCE or x.shape[1] <= 1:  # one step is the recurrence itself
            y_BLHP, final_BHPN = ssd_reference(*given)
        elif chosen is Impl.TRITON:
            from hybridnas.kernels.ssd.triton import ssd_triton

            y_BLHP, final_BHPN = ssd_triton(*given, chunk_size)
        else:
            y_BLHP, final_BHPN = ssd_chunked(*given, chunk_size)
    return (y_BLHP, final_BHPN) if return_final_state else y_BLHP


def describe(device: torch.device | str) -> str:
    """Return words on what computes the operation on ``device``."""
    if torch.device(device).type == "cuda":
        return words(device, "chunked matrix products")
    return "torch, chunked matrix products"


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> None:
    device = x.device
    require_tensor(_NAME, "x", x, "(B, L, H, P)", tuple(x.shape) if x.dim() == 4 else (0,) * 4, device)
    batch, length, heads, width = x.shape
    require_tensor(_NAME, "dt", dt, "(B, L, H)", (batch, length, heads), device)
    groups, size = tuple(B.shape[2:]) if B.dim() == 4 else (1, 0)
    for name, tensor in (("B", B), ("C", C)):
        require_tensor(_NAME, name, tensor, "(B, L, G, N)", (batch, length, groups, size), device)
    if groups < 1 or heads % groups:
        raise KernelInputError(f"{_NAME} B must have a number of groups G that divides H = {heads}, got G = {groups}")
    for name, vector in (("A", A), ("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            require_tensor(_NAME, name, vector, "(H,)", (heads,), device)
    if z is not None:
        require_tensor(_NAME, "z", z, "(B, L, H, P)", tuple(x.shape), device)
    if initial_state is not None:
        require_tensor(_NAME, "initial_state", initial_state, "(B, H, P, N)", (batch, heads, width, size), device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), device)
    if chunk_size < 1:
        raise KernelInputError(f"{_NAME} chunk_size must be at least 1 step, got {chunk_size}")
    require_finite(_NAME, "A", A)
