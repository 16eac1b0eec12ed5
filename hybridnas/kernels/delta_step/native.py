"""One token through a layer around a gated linear recurrence by step.c: the arguments are prepared once per layer.

Shapes as in ``reference.py``. float32, contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import pointer
from hybridnas.kernels.delta_step.reference import DECAYS, GATES, MAPS, NORMS, Form, Weights
from hybridnas.kernels.mamba_step.native import NORM_KINDS, THREAD_WEIGHTS, takes
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


class Step:
    """A layer's arguments, ready but for the token and the state. Holds no tensor: the caller's must live on."""

    def __init__(self, weights: Weights, form: Form, norm: Norm | None, residual: bool) -> None:
        w, (mixed, gate_in, decay_in, _) = weights, form.columns
        width, taps = w.in_proj.shape[1], 0 if w.conv is None else w.conv.shape[-1]
        decays = decay_in if w.decay_proj is None else w.decay_proj.shape[0]
        memory = (form.value_heads, form.key_dim, form.value_dim + (form.norm == "sum"))
        self._shapes = ((width,), (max(0, taps - 1), mixed), memory)
        self._size = sum(t.numel() for t in weights if t is not None)
        self._args = _Args(
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
        handle = compiled().handle
        assert handle is not None
        self._function = handle.hybridnas_delta_step

    def fits(self, *tensors: Tensor) -> bool:
        """Whether a token (B, D) and its states (B, T - 1, C), (B, H, K, M) are as step.c reads them."""
        batch = tensors[0].shape[0]
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            if not takes(tensor) or tensor.shape != (batch, *shape):
                return False
        return True

    def bound(self, conv: tuple[Tensor, Tensor], memory: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], None]:
        """Return what writes y, given x and y (B, D), and the second tensor of each (before, after) pair of states.

        Outputs may be their inputs. The states must live as long as the call; one call at a time.
        """
        args = _Args.from_buffer_copy(self._args)
        args.B = batch = conv[0].shape[0]
        args.conv_in, args.conv_out = conv[0].data_ptr(), conv[1].data_ptr()
        args.memory_in, args.memory_out = memory[0].data_ptr(), memory[1].data_ptr()
        most = max(1, (self._size * batch + memory[0].numel()) // THREAD_WEIGHTS)
        function, reference = self._function, ctypes.byref(args)

        def run(x_BD: Tensor, y_BD: Tensor) -> None:
            args.x, args.y = x_BD.data_ptr(), y_BD.data_ptr()
            args.threads = 1 if most == 1 else min(threads(), most)
            if function(reference):
                raise MemoryError("hybridnas_delta_step could not allocate its working memory")

        return run


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
