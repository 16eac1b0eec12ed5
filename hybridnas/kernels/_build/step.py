"""What the C functions have in common that take one token through a layer: sizes and pointers, prepared once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hybridnas.kernels._build import library, threads

THREAD_ELEMENTS = 262_144  # for each thread to read; with fewer, waiting for each other eats what it saves
NORM_KINDS = {"rmsnorm": 1, "layernorm": 2}


def takes(tensor: Tensor | None) -> bool:
    """Whether step.c can read a parameter or a state as it lies."""
    return tensor is None or (tensor.dtype == torch.float32 and tensor.is_cpu and tensor.is_contiguous())


class NativeStep:
    """A layer's arguments, ready but for the token and its two states. Holds no tensor: the caller's must live on.

    ``arguments`` has the fields B, threads, x, y, and NAME_in and NAME_out for each name of ``states``; ``shapes`` are
    those of the token and the states without the batch; ``elements`` is how many float32 a token reads [count].
    """

    def __init__(
        self,
        source: Path,
        function: str,
        arguments: ctypes.Structure,
        states: tuple[str, str],
        shapes: tuple[tuple[int, ...], ...],
        elements: int,
    ) -> None:
        handle = library(source).handle
        assert handle is not None
        self._name, self._function = function, getattr(handle, function)
        self._arguments, self._states, self._shapes, self._elements = arguments, states, shapes, elements

    def fits(self, *tensors: Tensor) -> bool:
        """Whether a token (B, D) and its states are as step.c reads them."""
        batch = tensors[0].shape[0]
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            if not takes(tensor) or tensor.shape != (batch, *shape):
                return False
        return True

    def bound(self, *pairs: tuple[Tensor, Tensor]) -> Callable[[Tensor, Tensor], None]:
        """Return what writes y, given x and y (B, D), and the second tensor of each (before, after) pair of states.

        Outputs may be their inputs. The states must live as long as the call; one call at a time.
        """
        args = type(self._arguments).from_buffer_copy(self._arguments)
        args.B = batch = pairs[0][0].shape[0]
        for name, (before, after) in zip(self._states, pairs, strict=True):
            setattr(args, f"{name}_in", before.data_ptr())
            setattr(args, f"{name}_out", after.data_ptr())
        most = max(1, self._elements * batch // THREAD_ELEMENTS)
        function, reference, name = self._function, ctypes.byref(args), self._name

        def run(x_BD: Tensor, y_BD: Tensor) -> None:
            args.x, args.y = x_BD.data_ptr(), y_BD.data_ptr()
            args.threads = 1 if most == 1 else min(threads(), most)
            if function(reference):
                raise MemoryError(f"{name} could not allocate its working memory")

        return run
