"""The selective scan of Mamba (arXiv 2312.00752), forward and backward, channel-last.

Shapes: B batch, L length, D channels, N state size. ``reference.py`` is the specification; ``cpu.py`` with ``scan.c``
is the fast path on a processor, ``triton.py`` on a GPU; ``chunked.py`` runs anywhere torch does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._inputs import full_precision, require_finite, require_seq_idx, require_tensor, state_dtype
from hybridnas.kernels._triton.choose import choose, takes_dtypes, words
from hybridnas.kernels._triton.shapes import MAX_STATE
from hybridnas.kernels.selective_scan import cpu
from hybridnas.kernels.selective_scan.chunked import scan_chunked
from hybridnas.kernels.selective_scan.reference import scan_reference

_NAME = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y (B, L, D) of h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t).

    u, delta, z (B, L, D); A (D, N); B, C (B, L, N); D, delta_bias (D,); states (B, D, N), float32 whatever the
    inputs (float64 for float64). ``seq_idx`` (B, L) integers: the state restarts where it changes along L. All
    floating inputs are differentiable. With ``return_final_state`` the result is (y, state after the last step).
    ``impl``: auto, reference, cpu (C on a processor, chunked torch elsewhere) or triton; a requested one runs or
    raises. auto on a CUDA device is triton, chunked torch for float64 and N > 256, which triton does not take.

    Raises KernelInputError for a wrong rank, shape, dtype, device or non-finite A, KernelUnavailableError for an
    implementation that cannot run here. Source: Gu and Dao 2023, algorithm 2 and section 3.3.
    """
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check(*given, seq_idx)
    takes = takes_dtypes(*given) and A.shape[1] <= MAX_STATE
    run = _form(choose(_NAME, impl, u.device, takes=takes), u.device, state_dtype(u, delta, A, B, C))
    with full_precision(u.device):
        y_BLD, final_BDN = run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx)
    return (y_BLD, final_BDN) if return_final_state else y_BLD


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return y (B, D) and the next state (B, D, N) for one token; the given state is left as it is.

    state (B, D, N); u, delta, z (B, D); A (D, N); B, C (B, N); D, delta_bias (D,). Raises KernelInputError for a
    wrong rank or shape.
    """
    name, device = "selective_state_update", state.device
    require_tensor(name, "state", state, "(B, D, N)", (*u.shape[:1], *A.shape), device)
    for label, tensor in (("u", u), ("delta", delta), *((("z", z),) if z is not None else ())):
        require_tensor(name, label, tensor, "(B, D)", tuple(state.shape[:2]), device)
    for label, tensor in (("B", B), ("C", C)):
        require_tensor(name, label, tensor, "(B, N)", (state.shape[0], state.shape[2]), device)
    dtype = state_dtype(state, u)
    dt_BD = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias
    if delta_softplus:
        dt_BD = F.softplus(dt_BD)
    u_BD = u.to(dtype)
    decayed_BDN = torch.exp(dt_BD[..., None] * A) * state
    next_BDN = torch.addcmul(decayed_BDN, (dt_BD * u_BD)[..., None], B.to(dtype)[:, None, :])
    with full_precision(device):
        y_BD = torch.matmul(next_BDN, C.to(dtype)[..., None]).squeeze(-1)
    if D is not None:
        y_BD = torch.addcmul(y_BD, u_BD, D.to(dtype))
    if z is not None:
        y_BD = y_BD * F.silu(z.to(dtype))
    return y_BD.to(u.dtype), next_BDN


def describe(device: torch.device | str) -> str:
    """Return words on what computes the scan on ``device``."""
    if torch.device(device).type == "cuda":
        return words(device, "chunked")
    library = cpu.compiled()
    return library.words if library.handle is not None else f"torch, chunked: {library.words}"


def _form(chosen: Impl, device: torch.device, dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that runs; ``dtype`` is that of the sums: C does them in float32 only."""
    if chosen is Impl.REFERENCE:
        return scan_reference
    if chosen is Impl.TRITON:
        from hybridnas.kernels.selective_scan.triton import scan_triton

        return scan_triton
    return cpu.scan_c if device.type == "cpu" and dtype == torch.float32 and cpu.available() else scan_chunked


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    device = u.device
    require_tensor(_NAME, "u", u, "(B, L, D)", tuple(u.shape) if u.dim() == 3 else (0, 0, 0), device)
    batch, length, channels = u.shape
    size = A.shape[1] if A.dim() == 2 else 0
    require_tensor(_NAME, "A", A, "(D, N)", (channels, size), device)
    wide, narrow = (batch, length, channels), (batch, length, size)
    require_tensor(_NAME, "delta", delta, "(B, L, D)", wide, device)
    require_tensor(_NAME, "B", B, "(B, L, N)", narrow, device)
    require_tensor(_NAME, "C", C, "(B, L, N)", narrow, device)
    if D is not None:
        require_tensor(_NAME, "D", D, "(D,)", (channels,), device)
    if z is not None:
        require_tensor(_NAME, "z", z, "(B, L, D)", wide, device)
    if delta_bias is not None:
        require_tensor(_NAME, "delta_bias", delta_bias, "(D,)", (channels,), device)
    if initial_state is not None:
        require_tensor(_NAME, "initial_state", initial_state, "(B, D, N)", (batch, channels, size), device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), device)
    require_finite(_NAME, "A", A)
