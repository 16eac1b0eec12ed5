"""How tensors become the arguments of a C function: a struct of sizes and pointers, checked where it is filled."""

from __future__ import annotations

import ctypes
from pathlib import Path

from torch import Tensor

from hybridnas.kernels._build import library


def rows(tensor: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous, without a copy where it already is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def call(source: Path, function: str, arguments: ctypes.Structure) -> None:
    """Run a function of the library of ``source``; raises MemoryError where it could not allocate its buffers."""
    handle = library(source).handle
    if handle is None:
        raise RuntimeError(f"{source.name} is not compiled; ask library() first")
    if getattr(handle, function)(ctypes.byref(arguments)):
        raise MemoryError(f"{function} could not allocate its working memory")


def struct(name: str, integers: str, pointers: str) -> type[ctypes.Structure]:
    """Return the ctypes structure of a C struct: int64 fields first, then pointers."""
    fields = [(n, ctypes.c_int64) for n in integers.split()] + [(n, ctypes.c_void_p) for n in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})
