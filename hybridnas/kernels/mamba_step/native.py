"""One token through a Mamba layer by step.c: the arguments are prepared once per set of weights.

Shapes: B batch, D d_model, I d_inner, N d_state, K d_conv. float32, contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import Library, library, threads
from hybridnas.kernels._build.arguments import pointer
from hybridnas.kernels.mamba_step.reference import Norm, Weights

SOURCE = Path(__file__).resolve().with_name("step.c")
NORM_KINDS = {"rmsnorm": 1, "layernorm": 2}
THREAD_WEIGHTS = 262_144  # weights for each thread to read; with fewer, waiting for each other eats what it saves
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


def takes(tensor: Tensor | None) -> bool:
    """Whether step.c can read a parameter or a state as it lies."""
    return tensor is None or (tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous())


class Step:
    """A layer's arguments, ready but for the token and the state. Holds no tensor: the caller's must live on."""

    def __init__(self, weights: Weights, norm: Norm | None, residual: bool) -> None:
        w = weights
        inner, width = w.in_proj.shape[0] // 2, w.in_proj.shape[1]
        self._shapes = ((width,), (w.conv.shape[-1] - 1, inner), (inner, w.A_log.shape[1]))
        self._size = sum(t.numel() for t in weights if t is not None)
        self._args = _Args(
            D=width, I=inner, N=w.A_log.shape[1], K=w.conv.shape[-1], R=0 if w.dt_proj is None else w.dt_proj.shape[1],
            norm=0 if norm is None else NORM_KINDS[norm.kind], residual=residual, eps=0.0 if norm is None else norm.eps,
            norm_weight=None if norm is None else pointer(norm.weight),
            norm_bias=None if norm is None else pointer(norm.bias),
            in_weight=pointer(w.in_proj), in_bias=pointer(w.in_bias), conv_weight=pointer(w.conv),
            conv_bias=pointer(w.conv_bias), x_weight=pointer(w.x_proj), dt_weight=pointer(w.dt_proj),
            dt_bias=pointer(w.dt_bias), A_log=pointer(w.A_log), D_skip=pointer(w.D), B_const=pointer(w.B),
            C_const=pointer(w.C), out_weight=pointer(w.out_proj), out_bias=pointer(w.out_bias),
        )  # fmt: skip
        handle = compiled().handle
        assert handle is not None
        self._function = handle.hybridnas_mamba_step

    def fits(self, *tensors: Tensor) -> bool:
        """Whether a token (B, D) and its states (B, K - 1, I), (B, I, N) are as step.c reads them."""
        batch = tensors[0].shape[0]
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            if not takes(tensor) or tensor.shape != (batch, *shape):
                return False
        return True

    def bound(self, conv: tuple[Tensor, Tensor], ssm: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], None]:
        """Return what writes y, given x and y (B, D), and the second tensor of each (before, after) pair of states.

        Outputs may be their inputs. The states must live as long as the call; one call at a time.
        """
        args = _Args.from_buffer_copy(self._args)
        args.B = batch = conv[0].shape[0]
        args.conv_in, args.conv_out = conv[0].data_ptr(), conv[1].data_ptr()
        args.ssm_in, args.ssm_out = ssm[0].data_ptr(), ssm[1].data_ptr()
        most = max(1, self._size * batch // THREAD_WEIGHTS)
        function, reference = self._function, ctypes.byref(args)

        def run(x_BD: Tensor, y_BD: Tensor) -> None:
            args.x, args.y = x_BD.data_ptr(), y_BD.data_ptr()
            args.threads = 1 if most == 1 else min(threads(), most)
            if function(reference):
                raise MemoryError("hybridnas_mamba_step could not allocate its working memory")

        return run


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
