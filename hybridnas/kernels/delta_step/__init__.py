"""One token through a whole layer around a gated linear recurrence, norm and residual included, in one call.

Shapes: B batch, D d_model, C mixed channels, T taps, H value heads, K key and M state channels of a head.
``reference.py`` is the specification in plain torch, which is the torch form too; ``native.py`` with ``step.c`` is the
fast form of decoding on a CPU, where dozens of small operations would each cost more than their arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels._inputs import full_precision, refused, require_tensor
from hybridnas.kernels.delta_step import native
from hybridnas.kernels.delta_step.reference import DECAYS, GATES, MAPS, NORMS, Form, Weights, step_reference
from hybridnas.kernels.mamba_step.reference import Norm

OPERATION = Operation(
    "delta_step",
    "operation by operation",
    native=native.compiled,
    native_available=native.available,
    native_dtypes=(torch.float32,),
)
describe = OPERATION.describe
_NAME = OPERATION.name


def delta_step(
    x: Tensor,
    conv_state: Tensor,
    memory: Tensor,
    weights: Weights,
    form: Form,
    *,
    norm: Norm | None = None,
    residual: bool = False,
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return block(norm(x)) (B, D), plus x with ``residual``, and the next two states; the given ones stay as they are.

    x (B, D); conv_state (B, T - 1, C), the inputs before x's; memory (B, H, K, M), M the value channels of a head, and
    one more for ``form.norm == "sum"``; weights and form as in ``Weights`` and ``Form``. Not differentiable: for
    generating. ``impl``: see ``Impl``; reference and torch are one form, native takes float32, there is no triton.

    Raises KernelInputError for a wrong rank, shape, dtype or device, KernelUnavailableError for an implementation that
    cannot run here. Sources: those of ``gated_delta``.
    """
    _check(x, conv_state, memory, weights, form, norm)
    norms = () if norm is None else (norm.weight, norm.bias)
    chosen = OPERATION.choose(impl, x.device, dtypes_of(x, conv_state, memory, *weights, *norms))
    run = native.step_native if chosen is Impl.NATIVE else step_reference
    with torch.no_grad(), full_precision(x.device):
        return run(x, conv_state, memory, weights, form, norm, residual)


def check_weights(w: Weights, form: Form, norm: Norm | None) -> None:
    """Raise KernelInputError unless the weights fit together and lie on one device, ConfigError for unknown words."""
    device, heads, keys = w.in_proj.device, form.value_heads, form.key_heads * form.key_dim
    for name, got, allowed in (
        ("decay", form.decay, DECAYS), ("feature_map", form.feature_map, MAPS), ("norm", form.norm, NORMS),
        ("gate", form.gate, GATES),
    ):  # fmt: skip
        if got not in allowed:
            message = f"{_NAME} {name}={got!r} must be one of {', '.join(allowed)}"
            raise ConfigError(message, field=name, got=got, allowed=allowed)
    inner, (mixed, gate, decay, beta) = heads * form.value_dim, form.columns
    needed = (1 if form.decay == "forget" else 2) * keys + inner
    if mixed != needed or beta != (heads if form.beta else 0) or heads % form.key_heads:
        raise refused(_NAME, "columns", f"must be (C, gate, decay, beta) with C = {needed}", form.columns, needed)
    width = w.in_proj.shape[1] if w.in_proj.dim() == 2 else 0
    decays = {"none": 0, "fixed": 0}.get(form.decay, heads * form.key_dim)
    if form.decay == "softplus" and w.decay_proj is None and decay == heads:
        decays = heads
    expected = (
        ("in_proj", w.in_proj, "(R, D)", (sum(form.columns), width)),
        ("conv", w.conv, "(C, T)", (mixed, w.conv.shape[-1] if w.conv is not None else 0)),
        ("conv_bias", w.conv_bias, "(C,)", (mixed,)),
        ("decay_proj", w.decay_proj, "(X, R)", (decays, decay)),
        ("decay_bias", w.decay_bias, "(X,)", (decays,)),
        ("A_log", w.A_log, "(H,)", (heads,)),
        ("dt_bias", w.dt_bias, "(X,)", (decays,)),
        ("frequency", w.frequency, "(K / 2,)", (form.key_dim // 2,)),
        ("gate_proj", w.gate_proj, "(I, R)", (inner, gate)),
        ("norm", w.norm, "(V,) or (I,)", ({"head": form.value_dim, "whole": inner}.get(form.norm, 0),)),
        ("out_proj", w.out_proj, "(D, I)", (width, inner)),
        ("norm weight", None if norm is None else norm.weight, "(D,)", (width,)),
        ("norm bias", None if norm is None else norm.bias, "(D,)", (width,)),
    )
    for name, tensor, letters, shape in expected:
        if tensor is not None:
            require_tensor(_NAME, name, tensor, letters, shape, device)
    for name, tensor, wanted in (
        ("A_log", w.A_log, form.decay in ("fixed", "softplus", "bounded")),
        ("dt_bias", w.dt_bias, form.decay in ("softplus", "bounded")),
    ):
        if (tensor is not None) != wanted:
            raise refused(_NAME, name, f"must be given exactly where decay={form.decay!r} needs it", tensor, wanted)


def _check(x: Tensor, conv_state: Tensor, memory: Tensor, w: Weights, form: Form, norm: Norm | None) -> None:
    check_weights(w, form, norm)
    device, batch = w.in_proj.device, x.shape[0] if x.dim() else 0
    before = 0 if w.conv is None else w.conv.shape[1] - 1
    state = (batch, form.value_heads, form.key_dim, form.value_dim + (form.norm == "sum"))
    require_tensor(_NAME, "x", x, "(B, D)", (batch, w.in_proj.shape[1]), device)
    require_tensor(_NAME, "conv_state", conv_state, "(B, T - 1, C)", (batch, before, form.columns[0]), device)
    require_tensor(_NAME, "memory", memory, "(B, H, K, M)", state, device)
