"""Decoding through a kernel that runs a whole layer for one token: ``kernels.mamba_step``, ``kernels.delta_step``.

Shapes: B batch, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hybridnas.kernels._build.step import takes
from hybridnas.kernels.mamba_step.reference import Norm
from hybridnas.layers.block import State
from hybridnas.layers.mode import has_hooks
from hybridnas.layers.norms import LayerNorm, RMSNorm, ZeroCenteredRMSNorm

MAX_BATCH = 32  # the fused step was measured to be 1.8 to 3 times faster than torch up to here, less with every row


class Step(Protocol):
    """A layer's prepared arguments, as the native modules of the kernels have them."""

    def fits(self, *tensors: Tensor) -> bool: ...

    def bound(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], /
    ) -> Callable[[Tensor, Tensor], None]: ...


class StepNorm(NamedTuple):
    """The norm before a layer's step: ``inside`` it as the kernels take it, or ``outside``, a module to call first."""

    inside: Norm | None
    outside: nn.Module | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the kernel reads of it."""
        return () if self.inside is None else (self.inside.weight, self.inside.bias)


def step_norm(norm: nn.Module) -> StepNorm | None:
    """Return how a norm goes with the kernels, or None where it is one of theirs with hooks.

    A module of another kind runs outside, and the step then has neither norm nor residual.
    """
    if not isinstance(norm, (LayerNorm, RMSNorm, ZeroCenteredRMSNorm)):
        return StepNorm(None, norm)
    if has_hooks(norm):
        return None
    if isinstance(norm, LayerNorm):
        return StepNorm(Norm("layernorm", norm.weight, norm.bias, norm.eps), None)
    factor = norm.weight if isinstance(norm, RMSNorm) else 1 + norm.weight
    return StepNorm(Norm("rmsnorm", factor, None, norm.eps or 0.0), None)


def readable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels can read the parameters by address, as they lie."""
    return all(t is None or (type(t) in (nn.Parameter, Tensor) and takes(t)) for t in tensors)


def run_in_place(
    step: Step, tensors: Sequence[Tensor | None], state: State, width: int, outside: nn.Module | None
) -> Callable[[Tensor], Tensor] | None:
    """Return x (B, D) -> the layer's output, which overwrites the state, and x too without ``outside``.

    None where the kernel cannot. ``tensors`` are all that the step reads by address: they are kept, whatever becomes of
    the parameters. ``outside``: as in :class:`StepNorm`.
    """
    first, second = (tensor.contiguous() for tensor in state)
    x_BD = first.new_empty(first.shape[0], width)
    if not 0 < x_BD.shape[0] <= MAX_BATCH or not step.fits(x_BD, first, second):
        return None
    call = step.bound((first, first), (second, second))
    held = [tensor.detach() for tensor in (*tensors, first, second) if tensor is not None]

    def run(x_BD: Tensor, _held: list[Tensor] = held) -> Tensor:
        if not takes(x_BD):
            x_BD = x_BD.float().contiguous()
        call(x_BD, x_BD)
        return x_BD

    def run_after(x_BD: Tensor, _held: list[Tensor] = held) -> Tensor:
        assert outside is not None
        read_BD = outside(x_BD)
        if not takes(read_BD):
            read_BD = read_BD.float().contiguous()
        y_BD = torch.empty_like(read_BD)
        call(read_BD, y_BD)
        return x_BD + y_BD

    return run if outside is None else run_after
