"""RWKV-7's time mix, letter W: a delta rule with a decay and a rate for each channel (Peng et al. 2025, 2503.14456).

Shapes: B batch, L length, D d_model, H heads, K channels of a head, I = H K, R inner width of a low-rank map.
"""

from __future__ import annotations

import math
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
from hybridnas.kernels import generalized_delta as kernel
from hybridnas.layers.block import Aux, Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.linear_recurrence import largest_divisor
from hybridnas.layers.token_shift import mixing_of, token_before
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_HEAD = 64  # channels of a head by default, as in all released models
_FASTEST = math.exp(-0.5)  # times sigmoid: the largest -log of a decay
# name of the mixing weights -> power of their first values, the authors' in a model's middle layer
_MIXED = {"x_r": 0.1, "x_w": 0.45, "x_k": 0.35, "x_v": 0.35, "x_a": 0.45, "x_g": 0.1}
_RANKS = {"decay": 2.5, "rate": 2.5, "gate": 5.0}  # times sqrt(D), rounded to a multiple of 32: the authors' advice


@exportable
class Rwkv7State(NamedTuple):
    """The last input, and the memory of each head in float32."""

    last_BD: Tensor
    memory_BHKK: Tensor  # keys by values


@register_block("W", name="rwkv7")
class Rwkv7(Block):
    """S_t = diag(w) S - (kappa * a) (S^T kappa)^T + k v^T, o = S^T r: arXiv 2503.14456, section 3.

    kappa is the key's direction, a the rate by channel at which what stands there is replaced, w the decay. Every
    projection reads a mixture of the token and the one before. ``y = output(g * (groupnorm(o) + (r * r_k . k) v))``.
    With ``value_rank`` the values are mixed with those of the model's first W, which has a value_rank of 0 itself.
    Equal to RWKV_Tmix_x070 of the authors' code, the state transposed.
    """

    outputs = ("output",)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the RWKV-7 block."""

        state_sizes = ("head_dim",)

        d_inner: int | None = option(None, "channels of all heads; none: d_model [channels]", ge=1)
        head_dim: int | None = option(
            None, "channels of a head; none: 64 or the next divisor of d_inner below [channels]", ge=1, sizable=True
        )
        decay_rank: int | None = option(
            None, "inner width of the decay; none: 2.5 sqrt(d_model) in steps of 32, at most d_model / 4", ge=1
        )
        rate_rank: int | None = option(None, "inner width of the in-context rate; none: as the decay's", ge=1)
        value_rank: int = option(
            0, "inner width of what mixes in the values of the model's first W; 0: own values alone [channels]", ge=0
        )
        gate_rank: int | None = option(
            None, "inner width of the output gate; none: 5 sqrt(d_model) in steps of 32, at most d_model / 4", ge=1
        )
        norm_eps: float = option(64e-5, "epsilon of the norm by head", gt=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.width % self.size:
                near = largest_divisor(self.width, self.size)
                raise ConfigError(
                    f"{self.label()} head_dim={self.size} does not divide the {self.width} channels; "
                    f"use head_dim={near}",
                    field="head_dim",
                    got=self.size,
                    allowed=f"a divisor of {self.width}, such as {near}",
                )

        @property
        def width(self) -> int:
            """Return d_inner with its default resolved."""
            return self.d_inner if self.d_inner is not None else self.d_model

        @property
        def size(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else largest_divisor(self.width, _HEAD)

        @property
        def first_width(self) -> int | None:
            return self.width

        @property
        def reads_first(self) -> bool:
            return self.value_rank > 0

        def ranks(self, d_model: int | None = None) -> dict[str, int]:
            """Return the inner widths of the low-rank maps, 0 for none, at a width of the model."""
            width = self.d_model if d_model is None else d_model
            given = {"decay": self.decay_rank, "rate": self.rate_rank, "gate": self.gate_rank}
            found = {name: _rank(width, _RANKS[name]) if rank is None else rank for name, rank in given.items()}
            return {**found, "value": self.value_rank}

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, di, ranks = self.d_model, self.width, self.ranks()
            matrices = 4 * d * di + sum(ranks.values()) * (d + di)
            biases = 2 * di + (di if self.value_rank else 0)
            params = matrices + biases + len(_MIXED) * d + 3 * di + 2 * di  # k_k, k_a, r_k; the norm
            flops = 2.0 * matrices + sum(self.kernel_flops().values())
            state = d * dtype_bytes + 4 * di * self.size
            return Cost(params=params, active_params=params, flops_per_token=flops, state_bytes=state)

        def kernel_flops(self) -> dict[str, float]:
            """Per entry of the memory 9: its decay, two for each of what is read, replaced, written and asked."""
            return {"generalized_delta": 9.0 * self.width * self.size}

        def canonical(self) -> dict[str, Any]:
            ranks = self.ranks()
            resolved = {f"{name}_rank": ranks[name] for name in _RANKS}
            return {**self.to_dict(), "d_inner": self.width, "head_dim": self.size, **resolved}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, di, ranks = config.d_model, config.width, config.ranks()
        for name in _MIXED:
            self.register_parameter(name, nn.Parameter(torch.empty(d)))
        self.receptance, self.key, self.value = (nn.Linear(d, di, bias=False) for _ in range(3))
        self.decay, self.rate = (_LowRank(d, ranks[name], di) for name in ("decay", "rate"))
        self.mix = _LowRank(d, ranks["value"], di) if config.value_rank else None
        self.gate = _LowRank(d, ranks["gate"], di, bias=False)
        self.k_k, self.k_a, self.r_k = (nn.Parameter(torch.empty(di)) for _ in range(3))
        self.norm = nn.GroupNorm(di // config.size, di, eps=config.norm_eps)
        self.output = nn.Linear(di, d, bias=False)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        # alone it is the first, whose own values are those that are mixed in
        unused = ("mix.down.weight", "mix.up.weight", "mix.up.bias")
        return [
            Variant(),
            Variant(fields={"head_dim": 4, "decay_rank": 3, "rate_rank": 2, "gate_rank": 5}),
            Variant(fields={"d_inner": 24, "head_dim": 6, "value_rank": 2}, without_gradient=unused),
        ]

    def forward(
        self,
        x_BLD: Tensor,
        state: State | None = None,
        segments_BL: Tensor | None = None,
        first_BLX: Tensor | None = None,
    ) -> BlockOutput:
        config: Rwkv7.Config = self.config
        before = None if state is None else cast(Rwkv7State, state)
        change_BLD = token_before(x_BLD, None if before is None else before.last_BD, segments_BL) - x_BLD
        r_BLD, w_BLD, k_BLD, v_BLD, a_BLD, g_BLD = (
            torch.addcmul(x_BLD, change_BLD, self.get_parameter(name)) for name in _MIXED
        )
        own_BLI = v_BLI = self.value(v_BLD)
        if self.mix is not None:  # alone it is the first itself
            first_BLI = own_BLI if first_BLX is None else first_BLX
            v_BLI = torch.lerp(own_BLI, first_BLI, self.mix(v_BLD).sigmoid())
        rate_BLI = self.rate(a_BLD).sigmoid()
        key_BLI = self.key(k_BLD)
        r, k, v, direction = (
            torch.unflatten(part, -1, (-1, config.size))
            for part in (
                self.receptance(r_BLD),
                torch.addcmul(key_BLI, key_BLI * (rate_BLI - 1), self.k_a),
                v_BLI,
                key_BLI * self.k_k,
            )
        )
        direction = F.normalize(direction, dim=-1)
        decay_BLI = self.decay(w_BLD, torch.tanh)
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        found = kernel.generalized_delta(
            r,
            k,
            v,
            torch.unflatten(-_FASTEST * decay_BLI.to(wide).sigmoid(), -1, (-1, config.size)),
            -direction,
            direction * torch.unflatten(rate_BLI, -1, (-1, config.size)),
            initial_state=None if before is None else before.memory_BHKK,
            return_final_state=before is not None,
            seq_idx=segments_BL,
            impl=kernel.OPERATION.nearest(self.impl),
        )
        o, memory_BHKK = found if isinstance(found, tuple) else (found, None)
        bonus = (r * k * self.r_k.view(-1, config.size)).sum(-1, keepdim=True) * v
        y_BLI = self._normed(o) + bonus.flatten(-2)
        y_BLD = self.output(y_BLI * self.gate(g_BLD, torch.sigmoid))
        aux = Aux({}, {}, own_BLI)
        if before is None or memory_BHKK is None:
            return BlockOutput(y_BLD, None, aux)
        last_BD = x_BLD[:, -1] if x_BLD.shape[1] else before.last_BD
        return BlockOutput(y_BLD, Rwkv7State(last_BD, memory_BHKK), aux)

    def _normed(self, o_BLHK: Tensor) -> Tensor:
        """Return (B, L, I), each head of each token normed by itself."""
        normed_BLI = F.layer_norm(o_BLHK, o_BLHK.shape[-1:], eps=self.norm.eps).flatten(-2)
        return torch.addcmul(self.norm.bias, normed_BLI, self.norm.weight)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        config: Rwkv7.Config = self.config
        memory = (batch_size, config.width // config.size, config.size, config.size)
        return Rwkv7State(
            torch.zeros(batch_size, config.d_model, device=device, dtype=dtype),
            torch.zeros(memory, device=device, dtype=torch.float32),
        )

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal projections, the keys' a tenth, and all else as the authors do, mixing by middle layer.

        Low-rank maps begin at 0, decays spread over the channels from e^-0.0015 to e^-0.5, rates are near a half.
        """
        config: Rwkv7.Config = self.config
        for linear in (self.receptance, self.key, self.value, self.output):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
        for name, power in _MIXED.items():
            mixing_of(self.get_parameter(name), power)
        place_I = torch.linspace(0, 1, config.width, device=self.k_k.device)
        within_I = torch.linspace(-1, 1, config.size, device=self.k_k.device).repeat(config.width // config.size)
        zigzag_I = within_I * within_I.abs()
        with torch.no_grad():
            self.key.weight.mul_(0.1)
            self.decay.reset_parameters(-5.5 + 6 * place_I.pow(1 + 0.5**0.3) + 2.5 * zigzag_I)
            self.rate.reset_parameters(-0.19 + 0.3 * zigzag_I + 0.4 * (place_I - 0.5))
            if self.mix is not None:
                self.mix.reset_parameters(0.73 - 0.4 * (place_I - 0.5))
            self.gate.reset_parameters()
            self.k_k.copy_(0.71 - 0.1 * (place_I - 0.5))
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
        self.norm.reset_parameters()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return those of the second matrices of the low-rank maps, whose fan-in is a rank."""
        config: Rwkv7.Config = self.config
        now, base = config.ranks(), config.ranks(base_width)
        maps = {"decay": self.decay, "rate": self.rate, "gate": self.gate, "value": self.mix}
        names = {"value": "mix"}
        return {
            f"{names.get(name, name)}.up.weight": matrix(now[name] / base[name])
            for name, part in maps.items()
            if part is not None
        }

    def implementations(self, device: torch.device) -> dict[str, str]:
        operation = kernel.OPERATION
        return {operation.name: operation.describe(device, impl=operation.nearest(self.impl))}


class _LowRank(nn.Module):
    """up(act(down(x))): two matrices with few channels between."""

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=False)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x_BLD: Tensor, activation: Any = None) -> Tensor:
        """Return (B, L, I)."""
        inner_BLR = self.down(x_BLD)
        y_BLI: Tensor = self.up(inner_BLR if activation is None else activation(inner_BLR))
        return y_BLI

    def reset_parameters(self, bias_I: Tensor | None = None) -> None:
        """Set the first matrix to 0, draw the second orthogonal at a tenth, and take the bias."""
        nn.init.zeros_(self.down.weight)
        rows, columns = self.up.weight.shape
        nn.init.orthogonal_(self.up.weight, gain=0.1 * math.sqrt(max(1.0, columns / rows)))
        if bias_I is not None:
            self.up.bias.copy_(bias_I)


def _rank(d_model: int, factor: float) -> int:
    advised = max(32, round(factor * math.sqrt(d_model) / 32) * 32)
    return min(advised, max(1, d_model // 4))
