"""The selective scan of Mamba (arXiv 2312.00752), forward and backward, channel-last.

Shapes: B batch, L length, D channels, N state size. ``reference.py`` is the specification, ``eager.py`` the chunked
form in plain torch, ``native.py`` with ``scan.c`` the one on a CPU, ``triton.py`` the one on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, require_finite, require_seq_idx, require_tensor, state_dtype
from hybridnas.kernels._triton.shapes import MAX_STATE
from hybridnas.kernels.selective_scan import native
from hybridnas.kernels.selective_scan.eager import scan_eager
from hybridnas.kernels.selective_scan.reference import Inputs, scan_reference

OPERATION = Operation(
    "selective_scan", "chunk by chunk", native=native.compiled, native_available=native.available, triton=True
)
describe = OPERATION.describe
_NAME = OPERATION.name


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
    ``impl``: see ``Impl``. native sums in float32 and does not take float64; triton takes float32, bfloat16, float16
    and N up to 256. The outputs of native, torch and triton can be differentiated once.

    Raises KernelInputError for a wrong rank, shape, dtype, device or non-finite A, KernelUnavailableError for an
    implementation that cannot run here. Source: Gu and Dao 2023, algorithm 2 and section 3.3.
    """
    inputs = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)
    _check(inputs)
    with full_precision(u.device):
        y_BLD, final_BDN = _run(inputs, impl)
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
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return y (B, D) and the next state (B, D, N) for one token; the given state is left as it is.

    state (B, D, N); u, delta, z (B, D); A (D, N); B, C (B, N); D, delta_bias (D,). ``impl``: auto is torch on every
    device, the others are those of ``selective_scan`` at length 1. Raises KernelInputError for a wrong rank or shape,
    KernelUnavailableError for an implementation that cannot run here.
    """
    name, device = "selective_state_update", state.device
    require_tensor(name, "state", state, "(B, D, N)", (*u.shape[:1], *A.shape), device)
    for label, tensor in (("u", u), ("delta", delta), *((("z", z),) if z is not None else ())):
        require_tensor(name, label, tensor, "(B, D)", tuple(state.shape[:2]), device)
    for label, tensor in (("B", B), ("C", C)):
        require_tensor(name, label, tensor, "(B, N)", (state.shape[0], state.shape[2]), device)
    if Impl.of(impl) not in (Impl.AUTO, Impl.TORCH):
        wide = (u[:, None], delta[:, None], A, B[:, None], C[:, None], D, None if z is None else z[:, None])
        with full_precision(device):
            y_BLD, final_BDN = _run(Inputs(*wide, delta_bias, state, None, delta_softplus), impl)
        return y_BLD[:, 0], final_BDN
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


def _run(inputs: Inputs, impl: str | Impl) -> tuple[Tensor, Tensor]:
    size = inputs.A.shape[1]
    limit = f"takes a state size N of at most {MAX_STATE}, got {size}" if size > MAX_STATE else ""
    chosen = OPERATION.choose(impl, inputs.u.device, dtypes_of(*inputs.floating), triton_limit=limit)
    if chosen is Impl.NATIVE:
        return native.scan_native(inputs)
    if chosen is Impl.TRITON:
        from hybridnas.kernels.selective_scan.triton import scan_triton

        return scan_triton(inputs)
    return scan_reference(inputs) if chosen is Impl.REFERENCE else scan_eager(inputs)


def _check(inputs: Inputs) -> None:
    u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, _ = inputs
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
