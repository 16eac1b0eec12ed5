"""One token through a Mamba layer by step.c: the arguments are prepared once per set of weights.

Shapes: B batch, D d_model, I d_inner, N d_state, K d_conv. float32, contiguous.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library
from hybridnas.kernels._build.arguments import pointer
from hybridnas.kernels._build.step import NORM_KINDS, NativeStep
from hybridnas.kernels.mamba_step.reference import Norm, Weights

SOURCE = Path(__file__).resolve().with_name("step.c")
_INTEGERS = "B D I N K R norm residual threads"
_POINTERS = (
    "x norm_weight norm_bias in_weight in_bias conv_weight conv_bias x_weight dt_weight dt_bias A_log D_skip "
    "B_const C_const out_weight out_bias conv_in ssm_in y conv_out ssm_out"
)


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


def compiled() -> Library:
    """Return the library of step.c, or why there is none."""
    return library(SOURCE)


def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


class Step(NativeStep):
    """A Mamba layer's arguments; the states are (B, K - 1, I) and (B, I, N)."""

    def __init__(self, weights: Weights, norm: Norm | None, residual: bool) -> None:
        w = weights
        inner, width = w.in_proj.shape[0] // 2, w.in_proj.shape[1]
        shapes = ((width,), (w.conv.shape[-1] - 1, inner), (inner, w.A_log.shape[1]))
        arguments = _Args(
            D=width, I=inner, N=w.A_log.shape[1], K=w.conv.shape[-1], R=0 if w.dt_proj is None else w.dt_proj.shape[1],
            norm=0 if norm is None else NORM_KINDS[norm.kind], residual=residual, eps=0.0 if norm is None else norm.eps,
            norm_weight=None if norm is None else pointer(norm.weight),
            norm_bias=None if norm is None else pointer(norm.bias),
            in_weight=pointer(w.in_proj), in_bias=pointer(w.in_bias), conv_weight=pointer(w.conv),
            conv_bias=pointer(w.conv_bias), x_weight=pointer(w.x_proj), dt_weight=pointer(w.dt_proj),
            dt_bias=pointer(w.dt_bias), A_log=pointer(w.A_log), D_skip=pointer(w.D), B_const=pointer(w.B),
            C_const=pointer(w.C), out_weight=pointer(w.out_proj), out_bias=pointer(w.out_bias),
        )  # fmt: skip
        elements = sum(t.numel() for t in weights if t is not None)
        super().__init__(SOURCE, "hybridnas_mamba_step", arguments, ("conv", "ssm"), shapes, elements)


def step_native(
    x_BD: Tensor, conv_BKI: Tensor, ssm_BIN: Tensor, weights: Weights, norm: Norm | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output and its next states; inputs that lie otherwise are copied first."""
    weights = Weights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]
    if norm is not None:
        weight, bias = (None if t is None else t.contiguous() for t in (norm.weight, norm.bias))
        norm = norm._replace(weight=weight, bias=bias)
    x_BD, conv_BKI, ssm_BIN = x_BD.contiguous(), conv_BKI.contiguous(), ssm_BIN.contiguous()
    y_BD, conv, ssm = (torch.empty_like(t) for t in (x_BD, conv_BKI, ssm_BIN))
    Step(weights, norm, residual).bound((conv_BKI, conv), (ssm_BIN, ssm))(x_BD, y_BD)
    return y_BD, conv, ssm
