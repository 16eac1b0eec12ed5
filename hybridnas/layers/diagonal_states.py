"""The state space of S4D as a layer: parameters, initial values, convolution or recurrence, and the skip.

Shapes: B batch, L length, C channels, N states of a channel that are computed, S systems, each of C / S channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels import diagonal_ssm as kernel

INITS = ("lin", "inv", "real")
INIT_DOC = "A at first, n-th of N states: lin -1/2 + i pi n, inv -1/2 + i N/pi (N / (2n + 1) - 1), real -(n + 1)"
OWN_FLOAT32 = ("log_dt", "log_A_real", "A_imag", "C", "D")  # parameters that are never narrower than float32
OWN_NO_DECAY = ("log_A_real", "A_imag")
_DT_MIN, _DT_MAX = 1e-3, 1e-1  # range of the step sizes at initialisation


def check_states(label: str, d_state: int, init: str) -> None:
    """Raise ConfigError for an odd number of complex states."""
    if init != "real" and d_state % 2:
        raise ConfigError(
            f"{label} d_state={d_state} must be even, since complex states come in pairs; use d_state={d_state + 1}, "
            f"or init='real'",
            field="d_state",
            got=d_state,
            allowed="an even number",
        )


def computed_states(d_state: int, init: str) -> int:
    """Return how many states of a channel are computed: one of each conjugate pair."""
    return d_state if init == "real" else d_state // 2


def states_params(systems: int, d_state: int) -> int:
    """Return the weights of that many systems: A and C, dt and D [count]."""
    return systems * (2 * d_state + 2)


def states_flops(channels: int, d_state: int, init: str) -> float:
    """Return FLOPs of one token: per state of the recurrence 4 (decay h, + u, weight h, +), 11 where it is complex.

    The convolution by FFT does less at any length above a few tokens.
    """
    return float(channels * computed_states(d_state, init) * (4 if init == "real" else 11))


class DiagonalStates(nn.Module):
    """y = S4D(u) + D u: arXiv 2206.11893, with B of 1 (section 3.1), as the authors' s4d.py.

    h_t = exp(dt A) h_{t-1} + u_t, y_t = Re(sum of C (exp(dt A) - 1) / A h_t): zero-order hold. States come in conjugate
    pairs, of which one is computed and counted twice; ``real`` ones are alone. Neighboring channels share a system
    where there are fewer systems than channels. A state is (B, C, N), of complex ones (B, C, N, 2), float32.
    """

    def __init__(self, channels: int, d_state: int, init: str, *, systems: int | None = None, impl: Impl = Impl.AUTO):
        super().__init__()
        count, size = systems or channels, computed_states(d_state, init)
        real = init == "real"
        self.channels, self.d_state, self.init = channels, d_state, init
        self.impl = kernel.OPERATION.nearest(impl)
        self.log_dt = nn.Parameter(torch.empty(count))
        self.log_A_real = nn.Parameter(torch.empty(count, size))
        self.A_imag = None if real else nn.Parameter(torch.empty(count, size))
        self.C = nn.Parameter(torch.empty((count, size) if real else (count, size, 2)))
        self.D = nn.Parameter(torch.empty(count))

    def forward(
        self, u_BLC: Tensor, state: Tensor | None = None, segments_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return y (B, L, C), and with a state the next one."""
        log_decay_CN, weight_CN = (self._of_channels(part) for part in self.discretized())
        if state is not None and self.A_imag is not None:
            state = torch.complex(state[..., 0], state[..., 1])
        found = kernel.diagonal_ssm(
            u_BLC,
            log_decay_CN,
            weight_CN,
            state,
            return_final_state=state is not None,
            seq_idx=segments_BL,
            impl=self.impl,
        )
        y_BLC, after = found if isinstance(found, tuple) else (found, None)
        if after is not None and after.is_complex():
            after = torch.view_as_real(after)
        return y_BLC + self._of_channels(self.D) * u_BLC, after

    def discretized(self) -> tuple[Tensor, Tensor]:
        """Return dt A and the weights of the states in the output, (S, N), real or complex."""
        wide = torch.promote_types(self.log_dt.dtype, torch.float32)
        A_SN, C_SN = -self.log_A_real.to(wide).exp(), self.C.to(wide)
        if self.A_imag is not None:
            A_SN = torch.complex(A_SN, self.A_imag.to(wide))
            C_SN = 2 * torch.complex(C_SN[..., 0], C_SN[..., 1])  # with its conjugate
        log_decay_SN = A_SN * self.log_dt.to(wide).exp()[:, None]
        return log_decay_SN, C_SN * torch.expm1(log_decay_SN) / A_SN

    def _of_channels(self, own: Tensor) -> Tensor:
        """Return each system's values once for every channel that it has."""
        return own.repeat_interleave(self.channels // own.shape[0], 0) if own.shape[0] < self.channels else own

    def init_state(self, batch_size: int, *, device: torch.device) -> Tensor:
        """Return the state of a sequence of which nothing has been read yet."""
        shape = (self.C if self.A_imag is not None else self.log_A_real).shape[1:]
        return torch.zeros(batch_size, self.channels, *shape, device=device, dtype=torch.float32)

    def reset_parameters(self) -> None:
        """Draw the authors' values."""
        with torch.no_grad():
            self.log_dt.uniform_(math.log(_DT_MIN), math.log(_DT_MAX))
            n = torch.arange(self.log_A_real.shape[1], dtype=torch.float32, device=self.log_dt.device)
            if self.A_imag is None:
                self.log_A_real.copy_((n + 1).log().expand_as(self.log_A_real))
            else:
                self.log_A_real.fill_(math.log(0.5))
                size = self.d_state
                imag = math.pi * n if self.init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
                self.A_imag.copy_(imag.expand_as(self.A_imag))
            self.C.normal_(std=1.0 if self.A_imag is None else 0.5**0.5)
            self.D.normal_()
