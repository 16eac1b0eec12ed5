"""Registration of custom operators that torch can differentiate once, compile and export."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from hybridnas.errors import KernelUnavailableError

NAMESPACE = "hybridnas"


def register_op(
    name: str,
    inputs: str,
    outputs: int,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    device: str | None = None,
) -> None:
    """Register ``torch.ops.hybridnas.NAME`` with the schema ``(inputs) -> (Tensor, ...)`` of ``outputs`` tensors.

    ``run`` computes the outputs, new tensors that are no views of the inputs; ``fake`` returns empty ones of their
    shapes and dtypes, for tracing. ``device``: the one device type that ``run`` takes, None for any.
    """
    returned = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", run, mutates_args=(), device_types=device, schema=f"({inputs}) -> {returned}"
    )
    op.register_fake(fake)


def register_differentiable_op(
    name: str,
    inputs: str,
    outputs: int,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    fake_gradients: Callable[..., Any],
    gradients: int,
    differentiable: int = 1,
    keep_first: bool = False,
    device: str | None = None,
) -> None:
    """Register an operator NAME and its gradient NAME_backward, which raises when it is differentiated again.

    ``inputs`` is a schema: tensors, ``Tensor`` or ``Tensor?``, before all other arguments. The first
    ``differentiable`` outputs have gradients, the others are kept for the backward, with ``keep_first`` after the first
    one. ``backward`` takes the inputs, the kept outputs, and one gradient for each differentiable output: the first
    always a tensor (where there are several, of the first input's shape), the others None where nothing depends on
    them. It returns the gradients of the first ``gradients`` inputs, any tensor for those that are None. ``fake`` and
    ``fake_gradients`` return empty tensors of the same shapes and dtypes.
    """
    kinds = [part.split()[0] for part in inputs.split(",")]
    tensors = sum(kind.startswith("Tensor") for kind in kinds)
    register_op(name, inputs, outputs, run=forward, fake=fake, device=device)
    kept = [f"Tensor kept{i}" for i in range(outputs - differentiable + keep_first)]
    upstream = ["Tensor dy", *(f"Tensor? d{i}" for i in range(1, differentiable))]
    register_op(
        f"{name}_backward",
        ", ".join([inputs, *kept, *upstream]),
        gradients,
        run=backward,
        fake=fake_gradients,
        device=device,
    )
    backward_op = getattr(getattr(torch.ops, NAMESPACE), f"{name}_backward")

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        extra = output[differentiable:] if outputs > 1 else ()
        ctx.mark_non_differentiable(*extra)
        if keep_first:
            extra = (output[0] if outputs > 1 else output, *extra)
        if differentiable > 1:
            ctx.set_materialize_grads(False)
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], *extra)

    def backpropagate(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        dy, *others = upstream[:differentiable]
        if dy is None:
            dy = torch.zeros_like(saved[0])
        found = backward_op(*saved[:tensors], *ctx.options, *saved[tensors:], dy, *others)
        found = (found,) if gradients == 1 else found
        wanted = [None if t is None else g for t, g in zip(saved, found, strict=False)]
        return (*wanted, *[None] * (len(kinds) - gradients))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backpropagate, setup_context=setup)
    refuse_second_derivative(name)


def refuse_second_derivative(name: str) -> None:
    """Make NAME_backward raise KernelUnavailableError where it is differentiated."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise _no_second_derivative(name)

    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse)


def differentiable_once(name: str) -> Callable[[Callable[..., tuple[Any, ...]]], Callable[..., tuple[Any, ...]]]:
    """Decorate the backward of an autograd function: its gradients raise KernelUnavailableError when differentiated."""

    def decorate(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        @wraps(backward)
        def run(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            floating = [g for g in gradients if isinstance(g, Tensor)]
            behind = [t for t in (*ctx.saved_tensors, *upstream) if t is not None and t.requires_grad]
            guarded = iter(_Refuse.apply(name, len(floating), *floating, *behind))  # type: ignore[no-untyped-call]
            return tuple(next(guarded) if isinstance(g, Tensor) else g for g in gradients)

        return run

    return decorate


class _Refuse(torch.autograd.Function):
    """The identity of the first ``count`` tensors, whose backward by any of them raises."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise _no_second_derivative(ctx.name)


def _no_second_derivative(name: str) -> KernelUnavailableError:
    message = f"{name} has no second derivative in this implementation; use impl='reference'"
    return KernelUnavailableError(message, field="impl", allowed=["reference"])
