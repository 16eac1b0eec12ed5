"""Gated linear recurrences with or without the delta rule: linear attention, RetNet, GLA, (Gated) DeltaNet, KDA.

Shapes: B batch, L length, G groups of heads that share queries and keys, H value heads, K channels of a key, V channels
of a value. ``reference.py`` is the specification, ``eager.py`` computes in torch's matrix products, ``native.py`` with
``recurrence.c`` step by step on a CPU, ``triton.py`` in matrix products on a GPU; ``fla.py`` calls
flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_seq_idx, require_tensor
from hybridnas.kernels.gated_delta import native
from hybridnas.kernels.gated_delta.eager import gated_delta_eager
from hybridnas.kernels.gated_delta.fla import gated_delta_fla
from hybridnas.kernels.gated_delta.native import MAX_KEY, gated_delta_native
from hybridnas.kernels.gated_delta.reference import Inputs, gated_delta_reference

OPERATION = Operation(
    "gated_delta",
    "chunked matrix products",
    native=native.compiled,
    native_available=native.available,
    triton=True,
    fla=True,
)
describe = OPERATION.describe
_NAME = OPERATION.name


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
    impl: str | Impl = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return o (B, L, H, V) of S_t = diag(exp(g_t)) S_{t-1} + k_t e_t^T, o_t = S_t^T (scale q_t), g the log decay.

    With ``beta``, the delta rule, e_t = beta_t (v_t - (diag(exp(g_t)) S_{t-1})^T k_t); without it e_t = v_t.

    q, k (B, L, G, K); v (B, L, H, V), G dividing H: value head h reads group h // (H // G). ``log_decay``: None (no
    decay), (H,) fixed by head, (B, L, H) by head and step, or (B, L, H, K) by channel too; not positive, -inf forgets.
    ``beta``: None or (B, L, H). ``scale`` is K ** -0.5 where it is None. States (B, H, K, V) are float32 whatever the
    inputs (float64 for float64). ``seq_idx`` (B, L) integers: the state restarts where it changes. All floating inputs
    are differentiable. With ``return_final_state``: (o, last state). ``chunk_size`` [steps] of the torch form, rounded
    up to a power of two, and at most of triton's, which takes 64 and less, does not change the result. ``impl``: see
    ``Impl``; native and triton take no float64 and at most 256 key channels (triton 128 in float32), fla bfloat16 and
    float16 alone; each of them can be differentiated once.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Sources: Yang et al. 2024, arXiv 2412.06464, section 3.1 (decay by head), Kimi Team 2025,
    arXiv 2510.26692, section 3 (by channel), Yang et al. 2023, arXiv 2312.06635, section 4 (without the delta rule).
    """
    inputs = Inputs(q, k, v, log_decay, beta, initial_state, seq_idx, scale, chunk_size)
    _check(inputs)
    size, half = q.shape[3], q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    limit = f"takes at most {MAX_KEY} key channels K, got {size}" if size > MAX_KEY else ""
    triton_limit = limit or ("" if half or size <= 128 else f"takes at most 128 key channels in float32, got {size}")
    fla_limit = "" if half else "takes q, k and v all in bfloat16 or all in float16"
    if q.shape[1] <= 1 and q.is_cuda and Impl.of(impl) is Impl.AUTO:
        impl = Impl.TORCH  # one step is the recurrence itself
    chosen = OPERATION.choose(
        impl, q.device, dtypes_of(*inputs.floating), native_limit=limit, triton_limit=triton_limit, fla_limit=fla_limit
    )
    with full_precision(q.device):
        o_BLHV, final_BHKV = _implementation(chosen)(inputs)
    return (o_BLHV, final_BHKV) if return_final_state else o_BLHV


def _implementation(chosen: Impl) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    if chosen is Impl.TRITON:
        from hybridnas.kernels.gated_delta.triton import gated_delta_triton

        return gated_delta_triton
    if chosen is Impl.FLA:
        return gated_delta_fla
    return {Impl.REFERENCE: gated_delta_reference, Impl.NATIVE: gated_delta_native}.get(chosen, gated_delta_eager)


def _check(inputs: Inputs) -> None:
    q, k, v, log_decay, beta, initial_state, seq_idx, _, chunk_size = inputs
    device = q.device
    require_tensor(_NAME, "q", q, "(B, L, G, K)", tuple(q.shape) if q.dim() == 4 else (0,) * 4, device)
    batch, length, groups, size = q.shape
    require_tensor(_NAME, "k", k, "(B, L, G, K)", (batch, length, groups, size), device)
    heads, width = tuple(v.shape[2:]) if v.dim() == 4 else (groups, 0)
    require_tensor(_NAME, "v", v, "(B, L, H, V)", (batch, length, heads, width), device)
    if size < 1:
        raise refused(_NAME, "q", f"must have at least one channel K, got {size}", size, ">= 1")
    if groups < 1 or heads % groups:
        raise refused(
            _NAME,
            "q",
            f"must have a number of groups G that divides H = {heads}, got G = {groups}",
            groups,
            [g for g in range(1, heads + 1) if heads % g == 0],
        )
    if log_decay is not None:
        letters, shape = {
            1: ("(H,)", (heads,)),
            3: ("(B, L, H)", (batch, length, heads)),
        }.get(log_decay.dim(), ("(H,), (B, L, H) or (B, L, H, K)", (batch, length, heads, size)))
        require_tensor(_NAME, "log_decay", log_decay, letters, shape, device)
    if beta is not None:
        require_tensor(_NAME, "beta", beta, "(B, L, H)", (batch, length, heads), device)
    if initial_state is not None:
        require_tensor(_NAME, "initial_state", initial_state, "(B, H, K, V)", (batch, heads, size, width), device)
    if seq_idx is not None:
        require_seq_idx(_NAME, seq_idx, (batch, length), device)
    if chunk_size < 1:
        raise refused(_NAME, "chunk_size", f"must be at least 1 step, got {chunk_size}", chunk_size, ">= 1")
