"""One token through a whole Mamba layer (arXiv 2312.00752), norm and residual included, in one call.

Shapes: B batch, D d_model, I d_inner, N d_state, K d_conv, R dt_rank, P what x_proj yields. ``reference.py`` is the
specification in plain torch, which is the torch form too; ``native.py`` with ``step.c`` is the fast form of decoding
on a CPU, where dozens of small operations would each cost more than their arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_tensor
from hybridnas.kernels.mamba_step import native
from hybridnas.kernels.mamba_step.reference import Norm, Weights, step_reference

OPERATION = Operation(
    "mamba_step",
    "operation by operation",
    native=native.compiled,
    native_available=native.available,
    native_dtypes=(torch.float32,),
)
describe = OPERATION.describe
_NAME = OPERATION.name
_KINDS = ("rmsnorm", "layernorm")


def mamba_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: Weights,
    *,
    norm: Norm | None = None,
    residual: bool = False,
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return block(norm(x)) (B, D), plus x with ``residual``, and the next two states; the given ones stay as they are.

    x (B, D); conv_state (B, K - 1, I), the inputs before x's; ssm_state (B, I, N); weights as in ``Weights``. Not
    differentiable: for generating. ``impl``: see ``Impl``; reference and torch are one form, native takes float32,
    there is no triton.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation that
    cannot run here. Source: Gu and Dao 2023, figure 3 and algorithm 2.
    """
    _check(x, conv_state, ssm_state, weights, norm)
    norms = () if norm is None else (norm.weight, norm.bias)
    chosen = OPERATION.choose(impl, x.device, dtypes_of(x, conv_state, ssm_state, *weights, *norms))
    run = native.step_native if chosen is Impl.NATIVE else step_reference
    with torch.no_grad(), full_precision(x.device):
        return run(x, conv_state, ssm_state, weights, norm, residual)


def check_weights(w: Weights, norm: Norm | None) -> None:
    """Raise KernelInputError unless the weights fit together and lie on one device."""
    device = w.in_proj.device
    (inner, states), taps, width = _pair("A_log", w.A_log), _pair("conv", w.conv)[1], _pair("in_proj", w.in_proj)[1]
    rank = 0 if w.dt_proj is None else _pair("dt_proj", w.dt_proj)[1]
    parts = rank + states * ((w.B is None) + (w.C is None))
    if (w.x_proj is None) != (parts == 0):
        raise refused(
            _NAME,
            "x_proj",
            f"must be given exactly where dt_proj is or B or C is not, to yield {parts} numbers a token",
            None if w.x_proj is None else tuple(w.x_proj.shape),
            (parts, inner) if parts else None,
        )
    expected = (
        ("in_proj", w.in_proj, "(2I, D)", (2 * inner, width)),
        ("in_bias", w.in_bias, "(2I,)", (2 * inner,)),
        ("conv", w.conv, "(I, K)", (inner, taps)),
        ("conv_bias", w.conv_bias, "(I,)", (inner,)),
        ("x_proj", w.x_proj, "(P, I)", (parts, inner)),
        ("dt_proj", w.dt_proj, "(I, R)", (inner, rank)),
        ("dt_bias", w.dt_bias, "(I,)", (inner,)),
        ("A_log", w.A_log, "(I, N)", (inner, states)),
        ("D", w.D, "(I,)", (inner,)),
        ("B", w.B, "(N,)", (states,)),
        ("C", w.C, "(N,)", (states,)),
        ("out_proj", w.out_proj, "(D, I)", (width, inner)),
        ("out_bias", w.out_bias, "(D,)", (width,)),
        ("norm weight", None if norm is None else norm.weight, "(D,)", (width,)),
        ("norm bias", None if norm is None else norm.bias, "(D,)", (width,)),
    )
    for name, tensor, letters, shape in expected:
        if tensor is not None:
            require_tensor(_NAME, name, tensor, letters, shape, device)
    if norm is not None and norm.kind not in _KINDS:
        raise ConfigError(
            f"{_NAME} norm={norm.kind!r} must be one of {', '.join(_KINDS)}",
            field="norm",
            got=norm.kind,
            allowed=_KINDS,
        )


def _check(x: Tensor, conv_state: Tensor, ssm_state: Tensor, w: Weights, norm: Norm | None) -> None:
    check_weights(w, norm)
    device, batch = w.in_proj.device, x.shape[0] if x.dim() else 0
    inner, states = w.A_log.shape
    require_tensor(_NAME, "x", x, "(B, D)", (batch, w.in_proj.shape[1]), device)
    require_tensor(_NAME, "conv_state", conv_state, "(B, K - 1, I)", (batch, w.conv.shape[1] - 1, inner), device)
    require_tensor(_NAME, "ssm_state", ssm_state, "(B, I, N)", (batch, inner, states), device)


def _pair(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2 or tensor.shape[1] < 1:
        raise refused(
            _NAME,
            name,
            f"must have two dimensions, got shape {tuple(tensor.shape)}",
            tuple(tensor.shape),
            "two dimensions",
        )
    return tensor.shape[0], tensor.shape[1]
