"""Run tokens through the experts that a router chose for them; letters: see reference.py.

    y_NO, counts_E = token_choice(x_ND, gate_NK, expert_NK, Experts(up_EDF, down_EFO), capacity=64)

``reference.py`` loops over tokens, ``eager.py`` is made of torch's batched matmuls, ``triton.py`` groups tokens and
multiplies in kernels of its own. auto is torch on every device until Triton's form is measured to be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridnas.errors import KernelInputError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation, dtypes_of
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.kernels.moe_dispatch.eager import expert_choice_eager, token_choice_eager
from hybridnas.kernels.moe_dispatch.reference import Experts, expert_choice_reference, token_choice_reference

__all__ = ["OPERATION", "Experts", "describe", "expert_choice", "token_choice"]

OPERATION = Operation(
    "moe_dispatch", "batched products padded to a capacity, else grouped_mm", triton=True, auto_triton=False
)
describe = OPERATION.describe


def token_choice(
    x_ND: Tensor,
    gate_NK: Tensor,
    expert_NK: Tensor,
    experts: Experts,
    *,
    capacity: int | None = None,
    impl: str | Impl = Impl.AUTO,
) -> tuple[Tensor, Tensor]:
    """Return y (N, O) = sum over a token's K distinct choices of gate * expert(x), and the choices per expert (E,).

    With a ``capacity`` an expert computes only the first that many tokens that chose it, in the order of N; counts are
    those before dropping. ``impl``: see ``Impl``; there is no native form, triton takes float32, bfloat16 and float16.

    Raises KernelInputError for shapes that do not fit, KernelUnavailableError for an implementation that cannot run
    here.
    """
    _check(x_ND, experts)
    if gate_NK.shape != expert_NK.shape or gate_NK.dim() != 2 or gate_NK.shape[0] != x_ND.shape[0]:
        got = tuple(gate_NK.shape), tuple(expert_NK.shape)
        raise KernelInputError(
            f"token_choice needs gate and expert of shape (N, K) with N={x_ND.shape[0]}, got {got[0]} and {got[1]}",
            field="gate",
            got=got,
            allowed=f"(N, K) with N={x_ND.shape[0]}",
        )
    if capacity is not None and capacity < 1:
        raise KernelInputError(
            f"token_choice capacity={capacity} must be >= 1, or None to drop nothing",
            field="capacity",
            got=capacity,
            allowed=">= 1 or None",
        )
    if capacity is not None and capacity >= x_ND.shape[0]:
        capacity = None  # an expert meets a token once at most, so nothing can drop
    chosen = _choose(impl, x_ND, gate_NK, experts)
    if chosen is Impl.REFERENCE:
        return token_choice_reference(x_ND, gate_NK, expert_NK, experts, capacity)
    if chosen is Impl.TRITON:
        from hybridnas.kernels.moe_dispatch.triton import token_choice_triton

        return token_choice_triton(x_ND, gate_NK, expert_NK, experts, capacity)
    return token_choice_eager(x_ND, gate_NK, expert_NK, experts, capacity)


def expert_choice(
    x_ND: Tensor, gate_EC: Tensor, token_EC: Tensor, experts: Experts, *, impl: str | Impl = Impl.AUTO
) -> Tensor:
    """Return y (N, O) = sum over the experts that picked a token of gate * expert(x); unpicked tokens get 0.

    ``impl`` and errors as in ``token_choice``.
    """
    _check(x_ND, experts)
    if gate_EC.shape != token_EC.shape or gate_EC.dim() != 2 or gate_EC.shape[0] != experts.up_EDF.shape[0]:
        got, n_experts = (tuple(gate_EC.shape), tuple(token_EC.shape)), experts.up_EDF.shape[0]
        raise KernelInputError(
            f"expert_choice needs gate and token of shape (E, C) with E={n_experts}, got {got[0]} and {got[1]}",
            field="gate",
            got=got,
            allowed=f"(E, C) with E={n_experts}",
        )
    chosen = _choose(impl, x_ND, gate_EC, experts)
    if chosen is Impl.REFERENCE:
        return expert_choice_reference(x_ND, gate_EC, token_EC, experts)
    if chosen is Impl.TRITON:
        from hybridnas.kernels.moe_dispatch.triton import expert_choice_triton

        return expert_choice_triton(x_ND, gate_EC, token_EC, experts)
    return expert_choice_eager(x_ND, gate_EC, token_EC, experts)


def _choose(impl: str | Impl, x_ND: Tensor, gate: Tensor, experts: Experts) -> Impl:
    device = x_ND.device
    if torch.is_autocast_enabled(device.type):  # the matrices are multiplied in its dtype
        return OPERATION.choose(impl, device, dtypes_of(gate))
    return OPERATION.choose(impl, device, dtypes_of(x_ND, gate, experts.up_EDF, experts.down_EFO))


def _check(x_ND: Tensor, experts: Experts) -> None:
    up, down = experts.up_EDF, experts.down_EFO
    if experts.activation not in ACTIVATIONS:
        raise KernelInputError(
            f"experts activation={experts.activation!r} must be one of {', '.join(ACTIVATIONS)}",
            field="activation",
            got=experts.activation,
            allowed=list(ACTIVATIONS),
        )
    hidden = down.shape[1] * (2 if experts.gated else 1) if down.dim() == 3 else -1
    if x_ND.dim() != 2 or up.dim() != 3 or tuple(up.shape) != (down.shape[0], x_ND.shape[1], hidden):
        raise KernelInputError(
            f"moe_dispatch needs x (N, D), up (E, D, {'2F' if experts.gated else 'F'}) and down (E, F, O), "
            f"got {tuple(x_ND.shape)}, {tuple(up.shape)} and {tuple(down.shape)}",
            field="experts",
            got=(tuple(x_ND.shape), tuple(up.shape), tuple(down.shape)),
            allowed="x (N, D), up (E, D, F), down (E, F, O)",
        )
