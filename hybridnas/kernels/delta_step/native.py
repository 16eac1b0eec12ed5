"""One token through a layer around a gated linear recurrence by step.c: the arguments are prepared once per layer.

Shapes as in ``reference.py``. float32, contiguous.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library
from hybridnas.kernels._build.arguments import pointer
from hybridnas.kernels._build.step import NORM_KINDS, NativeStep
from hybridnas.kernels.delta_step.reference import DECAYS, GATES, MAPS, NORMS, Form, Weights
from hybridnas.kernels.mamba_step.reference import Norm

SOURCE = Path(__file__).resolve().with_name("step.c")
_INTEGERS = "B D C T G H K N X gate_in decay_in silu map decay out_norm gate norm residual threads"
_REALS = "eps out_eps l2_eps sum_eps scale beta decay_by"
_POINTERS = (
    "x norm_weight norm_bias in_weight conv_weight conv_bias decay_weight decay_bias A_log dt_bias frequency "
    "gate_weight out_norm_weight out_weight conv_in memory_in y conv_out memory_out"
)


class _Args(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS.split()),
        *((name, ctypes.c_double) for name in _REALS.split()),
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
    ]


def compiled() -> Library:
    """Return the library of step.c, or why there is none."""
    return library(SOURCE)


def available() -> bool:
    """Whether the C path runs here; compiles it the first time."""
    return compiled().handle is not None


class Step(NativeStep):
    """The arguments of a layer around a linear recurrence; the states are (B, T - 1, C) and (B, H, K, M)."""

    def __init__(self, weights: Weights, form: Form, norm: Norm | None, residual: bool) -> None:
        w, (mixed, gate_in, decay_in, _) = weights, form.columns
        width, taps = w.in_proj.shape[1], 0 if w.conv is None else w.conv.shape[-1]
        decays = decay_in if w.decay_proj is None else w.decay_proj.shape[0]
        memory = (form.value_heads, form.key_dim, form.value_dim + (form.norm == "sum"))
        shapes = ((width,), (max(0, taps - 1), mixed), memory)
        arguments = _Args(
            D=width, C=mixed, T=taps, G=form.key_heads, H=form.value_heads, K=form.key_dim, N=form.value_dim, X=decays,
            gate_in=gate_in, decay_in=decay_in, silu=form.silu, map=MAPS.index(form.feature_map),
            decay=DECAYS.index(form.decay), out_norm=NORMS.index(form.norm), gate=GATES.index(form.gate),
            norm=0 if norm is None else NORM_KINDS[norm.kind], residual=residual, eps=0.0 if norm is None else norm.eps,
            out_eps=form.norm_eps, l2_eps=form.l2_eps, sum_eps=form.sum_eps, scale=form.scale, beta=form.beta,
            decay_by=form.decay_by, norm_weight=None if norm is None else pointer(norm.weight),
            norm_bias=None if norm is None else pointer(norm.bias), in_weight=pointer(w.in_proj),
            conv_weight=pointer(w.conv), conv_bias=pointer(w.conv_bias), decay_weight=pointer(w.decay_proj),
            decay_bias=pointer(w.decay_bias), A_log=pointer(w.A_log), dt_bias=pointer(w.dt_bias),
            frequency=pointer(w.frequency), gate_weight=pointer(w.gate_proj), out_norm_weight=pointer(w.norm),
            out_weight=pointer(w.out_proj),
        )  # fmt: skip
        elements = sum(t.numel() for t in weights if t is not None) + math.prod(memory)
        super().__init__(SOURCE, "hybridnas_delta_step", arguments, ("conv", "memory"), shapes, elements)


def step_native(
    x_BD: Tensor, conv_BTC: Tensor, memory_BHKM: Tensor, weights: Weights, form: Form, norm: Norm | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's output and its next states; inputs that lie otherwise are copied first."""
    weights = Weights(*(None if t is None else t.contiguous() for t in weights))  # type: ignore[arg-type]
    if norm is not None:
        weight, bias = (None if t is None else t.contiguous() for t in (norm.weight, norm.bias))
        norm = norm._replace(weight=weight, bias=bias)
    x_BD, conv_BTC, memory_BHKM = x_BD.contiguous(), conv_BTC.contiguous(), memory_BHKM.contiguous()
    y_BD, conv, memory = (torch.empty_like(t) for t in (x_BD, conv_BTC, memory_BHKM))
    Step(weights, form, norm, residual).bound((conv_BTC, conv), (memory_BHKM, memory))(x_BD, y_BD)
    return y_BD, conv, memory
