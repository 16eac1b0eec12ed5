"""Who computes an operation that has a Triton form, by device and dtypes; imports no triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.hardware import Impl, resolve_impl

_INSTALLED = find_spec("triton") is not None  # it has no wheel for macOS and Windows
MISSING = "the package triton is not installed; install it to run faster"


def installed() -> bool:
    """Whether the package triton can be imported."""
    return _INSTALLED


def choose(operation: str, impl: str | Impl, device: torch.device, *, takes: bool) -> Impl:
    """Return who runs ``operation``: reference, cpu (torch, on any device) or triton.

    ``takes``: whether the Triton form takes these dtypes and sizes. Under auto one that it does not take, such as
    float64, goes to torch, as does a machine without the package; a requested triton runs or raises
    KernelUnavailableError (its own checks raise KernelInputError for what it does not take).
    """
    chosen = resolve_impl(impl, device, operation)
    if chosen is not Impl.TRITON:
        return chosen
    if Impl.of(impl) is Impl.AUTO:
        return Impl.TRITON if _INSTALLED and takes else Impl.CPU
    if not _INSTALLED:
        raise KernelUnavailableError(
            f"{operation} impl='triton' needs the package triton; install it or use impl='cpu'"
        )
    return chosen


def takes_dtypes(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton forms take these: float32, bfloat16 and float16, never float64."""
    return all(t is None or t.dtype in _DTYPES for t in tensors)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require_dtypes(operation: str, **tensors: torch.Tensor | None) -> None:
    """Raise KernelInputError for a dtype that the Triton form of ``operation`` does not take."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise KernelInputError(
                f"{operation} impl='triton' takes float32, bfloat16 or float16, {name} is {tensor.dtype}; "
                "use impl='cpu'"
            )


def words(device: torch.device | str, torchs: str) -> str:
    """Return words on what runs on a CUDA device under auto; ``torchs`` names the form in torch."""
    if not _INSTALLED:
        return f"torch, {torchs}: {MISSING}"
    kernels = "Triton, tuned at the first call (choice cached)"
    return f"{kernels}; torch, {torchs}, for float64" if torch.device(device).type == "cuda" else kernels
