"""mLSTM, letter X: the matrix memory of xLSTM with exponential gates (Beck et al. 2024, 2025).

Shapes: B batch, L length, D d_model, H heads, K key channels and V value channels of a head, I = H V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels import gated_delta as kernel
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.linear_recurrence import largest_divisor
from hybridnas.layers.mode import has_hooks
from hybridnas.layers.split_linear import split_linear
from hybridnas.registry import register_block

_HEAD = 64  # value channels of a head by default; xLSTM-7B has 512
_INPUT_STD, _FORGET_BIAS = 0.1, (3.0, 6.0)  # of the gates' biases at initialisation, the latter over the heads


@exportable
class MlstmState(NamedTuple):
    """Memory of each head with its normalizer as the last column, and the running maximum; all float32."""

    memory_BHKV: Tensor  # (B, H, K, V + 1)
    maximum_BH: Tensor


@register_block("X", name="mlstm")
class Mlstm(Block):
    """``out_proj(sigmoid(o) * layernorm_by_head(h))``: arXiv 2405.04517, section 2.3, as in xLSTM-7B (2503.13427).

    C_t = f_t C_{t-1} + i_t k_t v_t^T and n_t = f_t n_{t-1} + i_t k_t with f = sigmoid, i = exp of capped gates;
    h_t = C_t^T q_t / (max(|n_t^T q_t|, 1) + eps), q of length 1 / sqrt(K). Both are kept divided by exp(m), with the
    running maximum m_t = max(log f_t + m_{t-1}, log i_t), which leaves h as it is and has no gradient; eps is added to
    the divided ones, as the authors do. Equal to transformers' xLSTMLayer; ``in_proj`` holds the rows of q, k, v and o,
    ``gates`` those of the input and the forget gate.
    """

    float32 = ("gates.bias",)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the mLSTM block."""

        state_sizes = ("head_dim",)

        n_heads: int | None = option(None, "heads; none: of 64 value channels, a divisor of d_inner [count]", ge=1)
        d_inner: int | None = option(None, "value channels of all heads; none: d_model [channels]", ge=1)
        head_dim: int | None = option(
            None, "key channels of a head; none: half of its value channels [channels]", ge=1, sizable=True
        )
        gate_softcap: float | None = option(15.0, "c of gates c * tanh(gate / c); none: not capped [1]", gt=0)
        bias: bool = option(False, "biases of the projections and the norm; the gates always have them")
        norm_eps: float = option(1e-6, "epsilon of the norm by head", gt=0)
        denominator_eps: float = option(1e-6, "added to the denominator of h", gt=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % self.heads:
                near = largest_divisor(self.width, self.heads)
                raise ConfigError(
                    f"{self.label()} n_heads={self.heads} does not divide the {self.width} value channels; "
                    f"use n_heads={near}",
                    field="n_heads",
                    got=self.heads,
                    allowed=f"a divisor of {self.width}, such as {near}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        @property
        def heads(self) -> int:
            """Return n_heads with its default resolved."""
            return (
                self.n_heads if self.n_heads is not None else largest_divisor(self.width, max(1, self.width // _HEAD))
            )

        @property
        def value_dim(self) -> int:
            """Return the value channels of a head."""
            return self.width // self.heads

        @property
        def key_dim(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else max(1, self.value_dim // 2)

        @property
        def columns(self) -> tuple[int, int, int, int]:
            """Return what ``in_proj`` yields: queries, keys, values and output gate [channels]."""
            keys = self.heads * self.key_dim
            return keys, keys, self.width, self.width

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, h = self.d_model, self.heads
            matrices = d * (sum(self.columns) + 2 * h + self.width)
            params = matrices + 2 * h + self.width + (sum(self.columns) + self.width + d if self.bias else 0)
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            state = 4 * h * (self.key_dim * (self.value_dim + 1) + 1)
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            """Per entry of the memory 5 (decay, k v, +, q C, +); per value channel 8 (norm, gate, quotient)."""
            return {"gated_delta": float(self.heads * (5 * self.key_dim * (self.value_dim + 1) + 8 * self.value_dim))}

        def canonical(self) -> dict[str, Any]:
            return {**self.to_dict(), "n_heads": self.heads, "d_inner": self.width, "head_dim": self.key_dim}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.in_proj = nn.Linear(config.d_model, sum(config.columns), bias=config.bias)
        self.gates = nn.Linear(config.d_model, 2 * config.heads)
        self.norm = _HeadNorm(config.heads, config.value_dim, config.norm_eps, config.bias)
        self.out_proj = nn.Linear(config.width, config.d_model, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 2, "d_inner": 20, "head_dim": 6, "bias": True}),
            Variant(fields={"n_heads": 4, "gate_softcap": None}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        config: Mlstm.Config = self.config
        before = None if state is None else cast(MlstmState, state)
        parts = split_linear(self.in_proj, x_BLD, config.columns)
        q_BLHK, k_BLHK, v_BLHV = (torch.unflatten(part, -1, (config.heads, -1)) for part in parts[:3])
        input_BLH, forget_BLH = self._log_gates(x_BLD)
        earlier_BLH, maximum_BLH = self._maxima(input_BLH, forget_BLH, before, segments_BL)
        wide = input_BLH.dtype
        # never above -log f, so that no decay is positive by rounding
        shift_BLH = torch.minimum((earlier_BLH - maximum_BLH).to(wide), -forget_BLH.detach())
        scale_BLH = (input_BLH - maximum_BLH.to(wide)).exp()
        found = kernel.gated_delta(
            q_BLHK.to(wide),
            k_BLHK.to(wide) * scale_BLH[..., None],
            F.pad(v_BLHV.to(wide), (0, 1), value=1.0),  # a value that is always 1 sums the keys
            forget_BLH + shift_BLH,
            scale=config.key_dim**-0.5,
            initial_state=None if before is None else before.memory_BHKV,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=kernel.OPERATION.nearest(self.impl),
        )
        both_BLHV, memory_BHKV = found if isinstance(found, tuple) else (found, None)
        weight_BLH1 = torch.maximum(both_BLHV[..., -1:].abs(), (-maximum_BLH).exp().to(wide)[..., None])
        h_BLHV = both_BLHV[..., :-1] / (weight_BLH1 + config.denominator_eps)
        y_BLD = self.out_proj(self.norm(h_BLHV).to(x_BLD.dtype) * parts[3].sigmoid())
        if before is None or memory_BHKV is None:
            return BlockOutput(y_BLD, None)
        last_BH = maximum_BLH[:, -1].to(wide) if x_BLD.shape[1] else before.maximum_BH
        return BlockOutput(y_BLD, MlstmState(memory_BHKV, last_BH))

    def _log_gates(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of input and forget gates, (B, L, H) in float32 or wider."""
        wide = torch.promote_types(self.gates.bias.dtype, torch.float32)
        if type(self.gates) is nn.Linear and not has_hooks(self.gates):  # the bias is added in float32
            gates_BLX = F.linear(x_BLD, self.gates.weight).to(wide) + self.gates.bias.to(wide)
        else:  # an adapter's module does more than its weight says
            gates_BLX = self.gates(x_BLD).to(wide)
        cap = self.config.gate_softcap
        if cap is not None:
            gates_BLX = cap * torch.tanh(gates_BLX / cap)
        input_BLH, forget_BLH = gates_BLX.chunk(2, dim=-1)
        return input_BLH, F.logsigmoid(forget_BLH)

    @torch.no_grad()
    def _maxima(
        self, input_BLH: Tensor, forget_BLH: Tensor, before: MlstmState | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the running maximum before and after each step, (B, L, H) in float64.

        With the sums s_t of log f, m_t - s_t is the running maximum of log i_t - s_t, where a sequence begins also of
        m_0 = 0. In each document the sums begin again, and what is compared is raised by more than all before it.
        """
        input_BLH, forget_BLH = input_BLH.double(), forget_BLH.double()
        batch, length, heads = input_BLH.shape
        sums_BLH, raised_BLH = forget_BLH.cumsum(1), torch.zeros_like(forget_BLH)
        start_BH = sums_BLH.new_zeros(batch, heads) if before is None else before.maximum_BH.double()
        candidates_BLH = input_BLH - sums_BLH
        if segments_BL is not None and length:
            first_BL = torch.zeros(batch, length, dtype=torch.bool, device=input_BLH.device)
            first_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
            place_L = torch.arange(length, device=input_BLH.device)
            begin_BL = torch.where(first_BL, place_L, 0).cummax(1).values
            sums_BLH = sums_BLH - (sums_BLH - forget_BLH).gather(1, begin_BL[..., None].expand(-1, -1, heads))
            candidates_BLH = input_BLH - sums_BLH
            candidates_BLH = torch.where(first_BL[..., None], candidates_BLH.clamp_min(0.0), candidates_BLH)
            apart_BH = candidates_BLH.amax(1).clamp_min(0.0) - candidates_BLH.amin(1) + 1
            raised_BLH = first_BL.cumsum(1)[..., None] * apart_BH[:, None]
        highest_BLH = torch.cat([start_BH[:, None], candidates_BLH + raised_BLH], 1).cummax(1).values
        maximum_BLH = highest_BLH[:, 1:] - raised_BLH + sums_BLH
        earlier_BLH = torch.cat([start_BH[:, None], maximum_BLH], 1)[:, :length]
        return earlier_BLH, maximum_BLH

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        config: Mlstm.Config = self.config
        memory = (batch_size, config.heads, config.key_dim, config.value_dim + 1)
        return MlstmState(
            torch.zeros(memory, device=device, dtype=torch.float32),
            torch.zeros(batch_size, config.heads, device=device, dtype=torch.float32),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections; gates as in xLSTM: weights 0, biases near 0 and, to forget, 3 to 6.

        xLSTM-7B begins with input gates of -10, whose gradients are below Adam's epsilon in a small model.
        """
        for linear in (self.in_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.norm.reset_parameters()
        heads = self.config.heads
        with torch.no_grad():
            self.gates.weight.zero_()
            self.gates.bias[:heads].normal_(std=_INPUT_STD)
            low, high = _FORGET_BIAS
            self.gates.bias[heads:] = torch.linspace(low, high, heads, device=self.gates.bias.device)

    def implementations(self, device: torch.device) -> dict[str, str]:
        operation = kernel.OPERATION
        return {operation.name: operation.describe(device, impl=operation.nearest(self.impl))}


class _HeadNorm(nn.Module):
    """LayerNorm of each head by itself, with weights for all channels; float32 or wider."""

    def __init__(self, heads: int, size: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads * size))
        self.bias = nn.Parameter(torch.empty(heads * size)) if bias else None
        self.eps = eps

    def forward(self, h_BLHV: Tensor) -> Tensor:
        """Return (B, L, I)."""
        normed_BLI = F.layer_norm(h_BLHV, h_BLHV.shape[-1:], eps=self.eps).flatten(-2)
        scaled_BLI = normed_BLI * self.weight
        return scaled_BLI if self.bias is None else scaled_BLI + self.bias

    def reset_parameters(self) -> None:
        """Set weights to 1 and biases to 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
