"""A diagonal, time-invariant state space, step by step: the specification.

Shapes: B batch, L length, D channels, N states of a channel.

    h_t = exp(log_decay) h_{t-1} + u_t,   y_t = Re(sum over N of weight h_t)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hybridnas.kernels._inputs import boundaries, state_dtype


class Inputs(NamedTuple):
    """The arguments of a state space, in the order of ``diagonal_ssm``."""

    u: Tensor  # (B, L, D)
    log_decay: Tensor  # (D, N), real or complex
    weight: Tensor  # (D, N)
    initial_state: Tensor | None = None  # (B, D, N)
    seq_idx: Tensor | None = None  # (B, L) integers

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of real sums, float32 or float64."""
        real = self.log_decay.real if self.log_decay.is_complex() else self.log_decay
        return state_dtype(self.u, real)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state."""
        return torch.promote_types(self.real_dtype, self.log_decay.dtype)

    @property
    def first(self) -> Tensor:
        """The state before the first step, (B, D, N)."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        return self.u.new_zeros(self.u.shape[0], *self.log_decay.shape, dtype=self.dtype)

    @property
    def nothing(self) -> Tensor:
        """An empty output that depends on all inputs."""
        scalars = [t.sum().abs().to(self.u.dtype) for t in (self.log_decay, self.weight)]
        return self.u + torch.stack(scalars).sum()


def real_part(tensor: Tensor) -> Tensor:
    """Return the real part of a complex tensor, a real tensor as it is."""
    return tensor.real if tensor.is_complex() else tensor


def ssm_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return y (B, L, D) in u's dtype and the final state (B, D, N), one step at a time, by plain autograd."""
    u, log_decay, weight, _, seq_idx = inputs
    h_BDN, decay_DN, weight_DN = inputs.first, log_decay.to(inputs.dtype).exp(), weight.to(inputs.dtype)
    if not u.numel():
        return inputs.nothing, h_BDN
    starts, outputs = None if seq_idx is None else boundaries(seq_idx).unbind(1), []
    for t, u_BD in enumerate(u.to(inputs.real_dtype).unbind(1)):
        if starts is not None:
            h_BDN = torch.where(starts[t][:, None, None], torch.zeros_like(h_BDN), h_BDN)
        h_BDN = decay_DN * h_BDN + u_BD[..., None]
        outputs.append(real_part((weight_DN * h_BDN).sum(-1)))
    return torch.stack(outputs, 1).to(u.dtype), h_BDN
