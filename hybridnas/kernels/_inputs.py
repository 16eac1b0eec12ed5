"""Checks of arguments that every operation makes before it touches memory, and parts that several share."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.errors import KernelInputError, NonFiniteInputError


def require_tensor(
    operation: str, name: str, tensor: Tensor, letters: str, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise KernelInputError unless ``tensor`` is floating point, of this shape, on this device."""
    if not isinstance(tensor, Tensor):
        got: object = type(tensor).__name__
        raise refused(operation, name, f"must be a tensor of shape {letters}, got {got}", got, "tensor")
    if tensor.shape != shape:
        got = tuple(tensor.shape)
        if tensor.dim() != len(shape):
            must = f"must have {len(shape)} dimensions {letters}, got shape {got}"
            raise refused(operation, name, must, got, letters)
        raise refused(operation, name, f"must have shape {letters} = {shape}, got {got}", got, shape)
    if not tensor.is_floating_point():
        must = f"must be floating point, got {tensor.dtype}"
        raise refused(operation, name, must, tensor.dtype, "floating point")
    if tensor.device != device:
        must = f"must be on {device} like the first argument, got {tensor.device}"
        raise refused(operation, name, must, tensor.device, device)


def require_seq_idx(operation: str, seq_idx: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise KernelInputError unless ``seq_idx`` is an integer tensor (B, L) on this device."""
    name = "seq_idx"
    if not isinstance(seq_idx, Tensor) or seq_idx.is_floating_point() or seq_idx.is_complex():
        got: object = seq_idx.dtype if isinstance(seq_idx, Tensor) else type(seq_idx).__name__
        raise refused(operation, name, f"must be an integer tensor (B, L), got {got}", got, "integers")
    if seq_idx.shape != shape:
        got = tuple(seq_idx.shape)
        raise refused(operation, name, f"must have shape (B, L) = {shape}, got {got}", got, shape)
    if seq_idx.device != device:
        must = f"must be on {device} like the first argument, got {seq_idx.device}"
        raise refused(operation, name, must, seq_idx.device, device)


def require_finite(operation: str, name: str, tensor: Tensor) -> None:
    """Raise NonFiniteInputError for NaN or infinity; checked on a CPU alone, where it needs no synchronization."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    if not math.isfinite(float(tensor.detach().sum())) and not bool(torch.isfinite(tensor.detach()).all()):
        raise NonFiniteInputError(
            f"{operation} {name} must be finite, got NaN or infinity; has the training diverged?",
            field=name,
            got="NaN or infinity",
            allowed="finite",
        )


def refused(operation: str, name: str, must: str, got: object, allowed: object) -> KernelInputError:
    """Return the error of an argument ``name`` that is not what it ``must`` be."""
    return KernelInputError(f"{operation} {name} {must}", field=name, got=got, allowed=allowed)


def boundaries(seq_idx_BL: Tensor) -> Tensor:
    """Return (B, L) bool, true where a document begins that is not the first of its row."""
    changes = torch.ne(seq_idx_BL[:, 1:], seq_idx_BL[:, :-1])
    return F.pad(changes, (1, 0))[:, : seq_idx_BL.shape[1]]


def empty_result(shape: tuple[int, ...], *inputs: Tensor | None) -> Tensor:
    """Return an empty tensor that depends on all inputs, so that each has a gradient of its shape: zeros.

    The first input gives dtype and device. Raises ValueError for a shape that has elements.
    """
    if math.prod(shape):
        raise ValueError(f"a result of shape {shape} is not empty")
    given = [t for t in inputs if t is not None]
    return given[0].new_empty(shape) + torch.stack([t.sum().to(given[0].dtype) for t in given]).sum()


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of states and sums: float64 where an input is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast: what a kernel sums in float32 must not be rounded on the way."""
    if device.type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
