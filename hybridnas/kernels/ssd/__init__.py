"""State-space duality, the scan of Mamba-2 (arXiv 2405.21060), in matrix products, forward and backward.

Shapes: B batch, L length, H heads, P channels of a head, G groups, N state size. ``reference.py`` is the
specification, ``eager.py`` computes in torch's matrix products, ``triton.py`` on a GPU.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_finite, require_seq_idx, require_tensor
from hybridnas.kernels.ssd.eager import ssd_eager
from hybridnas.kernels.ssd.reference import Inputs, ssd_reference

OPERATION = Operation("ssd", "chunked matrix products", triton=True)
describe = OPERATION.describe
_NAME = OPERATION.name


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
    ``impl``: see ``Impl``; there is no native form, triton takes float32, bfloat16 and float16.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: Dao and Gu 2024, section 6.
    """
    inputs = Inputs(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, chunk_size)
    _check(inputs)
    if x.shape[1] <= 1 and Impl.of(impl) is Impl.AUTO:
        impl = Impl.TORCH  # one step is the recurrence itself, on every device
    chosen = OPERATION.choose(impl, x.device, dtypes_of(*inputs.floating))
    with full_precision(x.device):
        if chosen is Impl.TRITON:
            from hybridnas.kernels.ssd.triton import ssd_triton

            y_BLHP, final_BHPN = ssd_triton(inputs)
        else:
            y_BLHP, final_BHPN = ssd_reference(inputs) if chosen is Impl.REFERENCE else ssd_eager(inputs)
    return (y_BLHP, final_BHPN) if return_final_state else y_BLHP


def _check(inputs: Inputs) -> None:
    x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, _, chunk_size = inputs
    device = x.device
    require_tensor(_NAME, "x", x, "(B, L, H, P)", tuple(x.shape) if x.dim() == 4 else (0,) * 4, device)
    batch, length, heads, width = x.shape
    require_tensor(_NAME, "dt", dt, "(B, L, H)", (batch, length, heads), device)
    groups, size = tuple(B.shape[2:]) if B.dim() == 4 else (1, 0)
    for name, tensor in (("B", B), ("C", C)):
        require_tensor(_NAME, name, tensor, "(B, L, G, N)", (batch, length, groups, size), device)
    if groups < 1 or heads % groups:
        raise refused(
            _NAME,
            "B",
            f"must have a number of groups G that divides H = {heads}, got G = {groups}",
            groups,
            [g for g in range(1, heads + 1) if heads % g == 0],
        )
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
        raise refused(_NAME, "chunk_size", f"must be at least 1 step, got {chunk_size}", chunk_size, ">= 1")
    require_finite(_NAME, "A", A)
