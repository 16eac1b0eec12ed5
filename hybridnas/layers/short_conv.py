"""A short causal convolution over time, each channel by itself; its state is its last inputs.

Shapes: B batch, L length, C channels, K taps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.hardware import Impl
from hybridnas.kernels import causal_conv1d as kernel
from hybridnas.layers.mode import has_hooks


class ShortConvolution(nn.Conv1d):
    """Depthwise causal convolution, then SiLU as in Mamba or nothing; parameters as torch's depthwise ``Conv1d``."""

    def __init__(
        self, channels: int, taps: int, *, bias: bool, activation: str | None = "silu", impl: Impl = Impl.AUTO
    ) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias)
        self.activation = activation
        self.impl = impl

    def forward(  # type: ignore[override]
        self, x_BLC: Tensor, state_BKC: Tensor | None = None, segments_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, L, C), and with a state of the K - 1 inputs before x the one after it, else None.

        ``segments_BL``: no tap reaches over a change of it.
        """
        found = kernel.causal_conv1d(
            x_BLC,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_state=None if state_BKC is None else state_BKC.to(x_BLC.dtype),
            return_final_state=state_BKC is not None,
            seq_idx=segments_BL,
            impl=self.impl,
        )
        return found if isinstance(found, tuple) else (found, None)

    def one_token(self, state_BKC: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return a fast x (B, C) -> y (B, C) for one token after another; None where there is none but ``forward``.

        Weights and state are read once, here. For use without gradients.
        """
        if type(self) is not ShortConvolution or has_hooks(self) or self.impl not in (Impl.AUTO, Impl.TORCH):
            return None
        *earlier_KC, now_C = self.weight.squeeze(1).t().contiguous().unbind()
        bias_C, silu = self.bias, self.activation == "silu"
        window = deque(state_BKC.to(now_C.dtype).unbind(1))  # tensors that change places: nothing is copied

        def run(x_BC: Tensor) -> Tensor:
            y_BC = x_BC * now_C if bias_C is None else torch.addcmul(bias_C, x_BC, now_C)
            for past_BC, tap_C in zip(window, earlier_KC, strict=True):
                y_BC = torch.addcmul(y_BC, past_BC, tap_C)
            if window:
                window.popleft()
                window.append(x_BC)
            return F.silu(y_BC) if silu else y_BC

        return run

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return zeros (B, K - 1, C): nothing has been read yet."""
        return torch.zeros(batch_size, self.kernel_size[0] - 1, self.in_channels, device=device, dtype=dtype)
