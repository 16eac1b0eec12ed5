"""Canon layer: a residual, depthwise, causal convolution of a few taps beside any mixer.

Shapes: B batch, L length, D channels, K taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hybridnas.hardware import Impl
from hybridnas.kernels.causal_conv1d import OPERATION, causal_conv1d


class Canon(nn.Module):
    """x_t + sum_k weight_k x_(t - K + 1 + k), each channel by itself (Allen-Zhu 2025, arXiv 2512.17351, section 3).

    Without activation and bias, as the paper advises. With two taps it holds RWKV's token shift as a special case.
    """

    def __init__(self, channels: int, taps: int, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.impl = impl

    def forward(
        self, x_BLD: Tensor, state_BKD: Tensor | None = None, segments_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, L, D), and with a state of the K - 1 inputs before x the one after it, else None.

        ``segments_BL``: no tap reaches over a change of it.
        """
        found = causal_conv1d(
            x_BLD,
            self.weight,
            initial_state=None if state_BKD is None else state_BKD.to(x_BLD.dtype),
            return_final_state=state_BKD is not None,
            seq_idx=segments_BL,
            impl=self.impl,
        )
        mixed_BLD, after_BKD = found if isinstance(found, tuple) else (found, None)
        return x_BLD + mixed_BLD, after_BKD

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return zeros (B, K - 1, D): nothing has been read yet."""
        channels, taps = self.weight.shape
        return torch.zeros(batch_size, taps - 1, channels, device=device, dtype=dtype)

    def one_row(self, state_BKD: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the layer for one token (B, D) after another, from a state on; without gradients, in three operations.

        The weights are read once, here.
        """
        past_BKD = state_BKD
        weight_KD = self.weight.t().clone()
        weight_KD[-1] += 1  # the residual

        def run(x_BD: Tensor) -> Tensor:
            nonlocal past_BKD
            if x_BD.dtype != torch.float32 or weight_KD.dtype != torch.float32:
                y_BLD, after_BKD = self(x_BD[:, None], past_BKD)
                assert after_BKD is not None
                past_BKD = after_BKD
                one: Tensor = y_BLD[:, 0]
                return one
            window_BKD = torch.cat([past_BKD, x_BD[:, None]], dim=1)
            past_BKD = window_BKD[:, 1:]
            return (window_BKD * weight_KD).sum(dim=1)

        return run

    def implementations(self, device: torch.device) -> dict[str, str]:
        """Return operation -> words on what computes it on a device."""
        return {OPERATION.name: OPERATION.describe(device, impl=OPERATION.nearest(self.impl))}

    def reset_parameters(self) -> None:
        """Draw as the authors' code does: uniform within K ** -0.5, torch's rule for a depthwise convolution."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
