"""RMSNorm and LayerNorm, and both with the residual's addition in front of them.

Shapes: N rows (any number of leading dimensions), D features. ``reference.py`` is the specification, ``eager.py`` the
form in torch's operations, ``triton.py`` fuses either norm with the addition on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import refused, require_tensor
from hybridnas.kernels._triton.shapes import MAX_FEATURES
from hybridnas.kernels.rmsnorm.eager import norm_eager
from hybridnas.kernels.rmsnorm.reference import norm_reference

OPERATION = Operation(
    "rmsnorm",
    "F.layer_norm; RMSNorm with an own backward on a CPU, else F.rms_norm",
    triton=True,
    triton_dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    auto_triton=False,
)
describe = OPERATION.describe
_OPERATIONS = {name: OPERATION._replace(name=name) for name in ("rms_norm", "layer_norm", "add_norm")}
_KINDS = ("rmsnorm", "layernorm")


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5, *, impl: str | Impl = Impl.AUTO) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in x's dtype, statistics in float32 or wider.

    x (..., D); weight (D,) or None; both differentiable, once. ``impl``: see ``Impl``; there is no native form, and
    auto is torch on every device: its RMSNorm on CUDA is one kernel already.

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
    saves the pass over memory.
    """
    if kind not in _KINDS:
        message = f"add_norm kind={kind!r} must be one of {', '.join(_KINDS)}"
        raise ConfigError(message, field="kind", got=kind, allowed=_KINDS)
    if kind == "rmsnorm" and bias is not None:
        message = "add_norm bias must be None for kind='rmsnorm', which has none; use kind='layernorm'"
        raise ConfigError(message, field="bias", got=tuple(bias.shape))
    return _norm("add_norm", x, residual, weight, bias, eps, kind, impl)


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
    features = x.shape[-1]
    limit = f"takes at most {MAX_FEATURES} features D, got {features}" if features > MAX_FEATURES else ""
    chosen = _OPERATIONS[operation].choose(impl, x.device, dtypes_of(x, weight, bias), triton_limit=limit)
    centered = kind == "layernorm"
    if chosen is Impl.TRITON:
        from hybridnas.kernels.rmsnorm.triton import norm_triton

        flat = None if residual is None else residual.reshape(-1, features)
        y_ND, total_ND = norm_triton(x.reshape(-1, features), flat, weight, bias, eps, centered=centered)
        return y_ND.view(x.shape), total_ND.view(x.shape)
    total = x if residual is None else x + residual
    run = norm_reference if chosen is Impl.REFERENCE else norm_eager
    return run(total, weight, bias, eps, centered=centered), total


def _check(
    operation: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        got = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        must = f"must be a floating-point tensor (..., D) with D >= 1, got {got}"
        raise refused(operation, "x", must, got, "floating-point tensor (..., D)")
    if residual is not None:
        require_tensor(operation, "residual", residual, "(..., D)", tuple(x.shape), x.device)
        if residual.dtype != x.dtype:
            must = f"must be {x.dtype} like x, got {residual.dtype}"
            raise refused(operation, "residual", must, residual.dtype, x.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_tensor(operation, name, tensor, "(D,)", (x.shape[-1],), x.device)
    if not eps >= 0:
        raise refused(operation, "eps", f"must be at least 0, got {eps}", eps, ">= 0")
