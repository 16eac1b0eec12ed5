"""RMSNorm and LayerNorm, and both with the residual's addition in front of them.

Shapes: N rows (any number of leading dimensions), D features. ``reference.py`` is the specification; ``fast.py`` is
RMSNorm on a processor, LayerNorm there is torch's own; ``triton.py`` fuses either with the addition on a GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.hardware import Impl, resolve_impl
from hybridnas.kernels._inputs import require_tensor, state_dtype
from hybridnas.kernels.rmsnorm.fast import rms_norm_fast
from hybridnas.kernels.rmsnorm.reference import norm_reference

_KINDS = ("rmsnorm", "layernorm")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, impl: str | Impl = Impl.AUTO) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, statistics in float32 or wider.

    x (..., D); weight (D,) or None; both differentiable, once. ``impl``: reference, cpu (torch), triton, or auto:
    torch on every device (its RMSNorm on CUDA is one kernel already; on a processor and under compile see below).
    On a processor an own backward runs, 2 to 3 times faster than F.rms_norm's chain; under torch.compile F.rms_norm,
    which Inductor fuses.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation
    that cannot run here. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return _norm("rms_norm", x, None, weight, None, eps, "rmsnorm", impl)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    impl: str | Impl = Impl.AUTO,
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in x's dtype.

    x (..., D); weight, bias (D,) or None. Errors and ``impl`` as in ``rms_norm``; auto is F.layer_norm, one kernel on
    every device. Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.
    """
    return _norm("layer_norm", x, None, weight, bias, eps, "layernorm", impl)[0]


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    kind: str = "rmsnorm",
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return (norm(x + residual), x + residual), the two that a residual layer needs; ``kind``: rmsnorm or layernorm.

    x, residual (..., D) of one dtype; the rest as in ``rms_norm`` (which has no bias) and ``layer_norm``. Only triton
    saves the pass over memory; auto adds, then norms, until that is measured on a GPU.
    """
    if kind not in _KINDS:
        raise ConfigError(f"add_norm kind={kind!r} must be one of {', '.join(_KINDS)}")
    if kind == "rmsnorm" and bias is not None:
        raise ConfigError("add_norm bias must be None for kind='rmsnorm', which has none; use kind='layernorm'")
    return _norm("add_norm", x, residual, weight, bias, eps, kind, impl)


def describe(device: torch.device | str) -> str:
    """Return words on what computes RMSNorm and LayerNorm on ``device``."""
    own = torch.device(device).type == "cpu"
    return f"torch: F.layer_norm; RMSNorm {'with an own backward' if own else 'F.rms_norm'}"


def _norm(
    operation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    impl: str | Impl,
) -> tuple[Tensor, Tensor]:
    _check(operation, x, residual, weight, bias, eps)
    chosen = Impl.CPU if Impl.of(impl) is Impl.AUTO else resolve_impl(impl, x.device, operation)
    centered = kind == "layernorm"
    if chosen is Impl.TRITON:
        return _triton(operation, x, residual, weight, bias, eps, centered)
    total = x if residual is None else x + residual
    if chosen is Impl.REFERENCE:
        return norm_reference(total, weight, bias, eps, centered=centered), total
    # torch's CPU kernel sums the weights' gradients in bfloat16: a percent off after 40 rows
    dtype = state_dtype(x) if x.device.type == "cpu" else x.dtype
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    size = (x.shape[-1],)
    if centered:
        return F.layer_norm(total.to(dtype), size, weight, bias, eps).to(x.dtype), total
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(total.to(dtype), size, weight, eps).to(x.dtype), total
    return rms_norm_fast(total.reshape(-1, *size), weight, eps).view(x.shape), total


def _triton(
    operation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    if find_spec("triton") is None:
        raise KernelUnavailableError(
            f"{operation} impl='triton' needs the package triton; install it or use impl='cpu'"
        )
    from hybridnas.kernels.rmsnorm.triton import norm_triton

    flat = None if residual is None else residual.reshape(-1, x.shape[-1])
    y_ND, total_ND = norm_triton(x.reshape(-1, x.shape[-1]), flat, weight, bias, eps, centered=centered)
    return y_ND.view(x.shape), total_ND.view(x.shape)


def _check(
    operation: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        got = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise KernelInputError(f"{operation} x must be a floating-point tensor (..., D) with D >= 1, got {got}")
    if residual is not None:
        require_tensor(operation, "residual", residual, "(..., D)", tuple(x.shape), x.device)
        if residual.dtype != x.dtype:
            raise KernelInputError(f"{operation} residual must be {x.dtype} like x, got {residual.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_tensor(operation, name, tensor, "(D,)", (x.shape[-1],), x.device)
    if not eps >= 0:
        raise KernelInputError(f"{operation} eps must be at least 0, got {eps}")
