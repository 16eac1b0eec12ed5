"""Linear recurrences whose memory is changed along one direction and read along another: RWKV-7's delta rule.

Shapes: B batch, L length, H heads, K channels of a key, V channels of a value. ``reference.py`` is the specification,
``eager.py`` computes in torch's matrix products, ``native.py`` with ``recurrence.c`` step by step on a CPU.
"""

from __future__ import annotations

from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_seq_idx, require_tensor
from hybridnas.kernels.generalized_delta import native
from hybridnas.kernels.generalized_delta.eager import generalized_delta_eager
from hybridnas.kernels.generalized_delta.native import MAX_KEY, generalized_delta_native
from hybridnas.kernels.generalized_delta.reference import Inputs, generalized_delta_reference

OPERATION = Operation(
    "generalized_delta",
    "chunked matrix products",
    native=native.compiled,
    native_available=native.available,
)
describe = OPERATION.describe
_NAME = OPERATION.name
_BY_CHANNEL = ("q", "k", "log_decay", "a", "b")


def generalized_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) of S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T, o_t = S_t^T q_t.

    q, k, a, b and the log decay g, not positive, (B, L, H, K); v (B, L, H, V). The memory is read along a before it
    decays. States (B, H, K, V) are float32 whatever the inputs (float64 for float64). ``seq_idx`` (B, L) integers: the
    state restarts where it changes. All floating inputs are differentiable. With ``return_final_state``: (o, last
    state). ``chunk_size`` [steps] of the torch form, rounded up to a power of two, does not change the result.
    ``impl``: see ``Impl``; native takes no float64 and at most 256 key channels, and can be differentiated once.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: Peng et al. 2025, arXiv 2503.14456, section 3, the state transposed.
    """
    inputs = Inputs(q, k, v, log_decay, a, b, initial_state, seq_idx, chunk_size)
    _check(inputs)
    size = q.shape[3]
    limit = f"takes at most {MAX_KEY} key channels K, got {size}" if size > MAX_KEY else ""
    chosen = OPERATION.choose(impl, q.device, dtypes_of(*inputs.floating), native_limit=limit)
    run = {Impl.REFERENCE: generalized_delta_reference, Impl.NATIVE: generalized_delta_native}
    with full_precision(q.device):
        o_BLHV, final_BHKV = run.get(chosen, generalized_delta_eager)(inputs)
    return (o_BLHV, final_BHKV) if return_final_state else o_BLHV


def _check(inputs: Inputs) -> None:
    q, v, device = inputs.q, inputs.v, inputs.q.device
    require_tensor(_NAME, "q", q, "(B, L, H, K)", tuple(q.shape) if q.dim() == 4 else (0,) * 4, device)
    batch, length, heads, size = q.shape
    if size < 1:
        raise refused(_NAME, "q", f"must have at least one channel K, got {size}", size, ">= 1")
    for name in _BY_CHANNEL:
        require_tensor(_NAME, name, getattr(inputs, name), "(B, L, H, K)", (batch, length, heads, size), device)
    width = v.shape[3] if isinstance(v, Tensor) and v.dim() == 4 else 0
    require_tensor(_NAME, "v", v, "(B, L, H, V)", (batch, length, heads, width), device)
    if inputs.initial_state is not None:
        shape = (batch, heads, size, width)
        require_tensor(_NAME, "initial_state", inputs.initial_state, "(B, H, K, V)", shape, device)
    if inputs.seq_idx is not None:
        require_seq_idx(_NAME, inputs.seq_idx, (batch, length), device)
    if inputs.chunk_size < 1:
        got = inputs.chunk_size
        raise refused(_NAME, "chunk_size", f"must be at least 1 step, got {got}", got, ">= 1")
