"""Kimi delta attention, letter K: a delta rule whose memory decays by key channel (Kimi team 2025, arXiv 2510.26692).

Shapes: B batch, L length, D d_model, H heads, K key channels and V value channels of a head, C channels of the
convolution, R inner width of the decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels.delta_step.reference import Form, Weights
from hybridnas.layers.block import Variant
from hybridnas.layers.linear_recurrence import (
    LinearRecurrence,
    RecurrenceConfig,
    RecurrenceShape,
    draw_dt_bias_,
    largest_divisor,
    softplus_decay,
)
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_HEAD = 64  # channels of a head by default; the released models have 128
_A_MIN, _A_MAX = 1.0, 16.0  # range of -A at initialisation


@register_block("K", name="kimi_delta")
class KimiDelta(LinearRecurrence):
    """S_t = diag(exp(g_t)) S_{t-1}; S_t += k_t (beta_t (v_t - S_t^T k_t))^T; o_t = S_t^T q_t / sqrt(K).

    As Gated DeltaNet with one decay per key channel, g = -exp(A_log) softplus(f_b(f_a(x)) + dt_bias) of low rank, and
    a low-rank output gate: out_proj(rmsnorm(o) sigmoid(g_b(g_a(x)))). Source: arXiv 2510.26692, sections 3 and 4; as
    in transformers' KimiLinear and, with ``gate_lower_bound``, GLM-5-next and BailingHybrid. ``in_proj`` holds the
    rows of q, k, v, g_a, f_a and beta.
    """

    float32 = ("A_log", "dt_bias")
    no_decay = ("A_log", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(RecurrenceConfig):
        """Fields of the Kimi delta attention block."""

        n_heads: int | None = option(None, "heads; none: of 64 channels where that divides d_model [count]", ge=1)
        head_dim: int | None = option(
            None, "key channels of a head; none: d_model / n_heads [channels]", ge=1, sizable=True
        )
        value_head_dim: int | None = option(None, "value channels of a head; none: head_dim [channels]", ge=1)
        d_conv: int = option(4, "taps of the causal convolution of q, k and v; 0: SiLU alone [tokens]", ge=0)
        conv_bias: bool = option(False, "bias of the convolution")
        decay_rank: int | None = option(
            None,
            "inner width of the decay; none: value_head_dim, at most d_model / 4; 0: one matrix alone [channels]",
            ge=0,
        )
        gate_lower_bound: float | None = option(
            None, "least logarithm of a decay, g = bound sigmoid(exp(A_log) (f + dt_bias)), such as -5; none: no bound"
        )
        negative_eigenvalues: bool = option(False, "beta in [0, 2] in place of [0, 1] (arXiv 2411.12537)")
        gate: str = option("sigmoid", "activation of the output gate, or none", choices=("sigmoid", "silu", "none"))
        gate_rank: int | None = option(
            None,
            "inner width of the gate; none: value_head_dim, at most d_model / 4; 0: one matrix alone [channels]",
            ge=0,
        )
        norm_eps: float = option(1e-5, "epsilon of the output norm", gt=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head_dim is None and self.d_model % self.heads:
                near = largest_divisor(self.d_model, self.heads)
                raise ConfigError(
                    f"{self.label()} n_heads={self.heads} does not divide d_model={self.d_model}; use n_heads={near}, "
                    f"or give head_dim",
                    field="n_heads",
                    got=self.heads,
                    allowed=f"a divisor of {self.d_model}, such as {near}",
                )
            if self.gate_lower_bound is not None and self.gate_lower_bound >= 0:
                raise ConfigError(
                    f"{self.label()} gate_lower_bound={self.gate_lower_bound} must be below 0, since it is the "
                    f"logarithm of the least decay; use -5",
                    field="gate_lower_bound",
                    got=self.gate_lower_bound,
                    allowed="< 0",
                )
            if self.gate == "none" and self.gate_rank is not None:
                raise ConfigError(
                    f"{self.label()} gate_rank={self.gate_rank} needs an output gate, got gate='none'; use "
                    f"gate='sigmoid' or leave gate_rank out",
                    field="gate_rank",
                    got=self.gate_rank,
                    allowed=(None,),
                )
            if self.conv_bias and not self.d_conv:
                raise ConfigError(
                    f"{self.label()} conv_bias=True needs a convolution, got d_conv=0; use d_conv=4 or conv_bias=False",
                    field="conv_bias",
                    got=True,
                    allowed=(False,),
                )

        @property
        def heads(self) -> int:
            """Return n_heads with its default resolved."""
            return self._heads_at(self.d_model)

        def _heads_at(self, d_model: int) -> int:
            if self.n_heads is not None:
                return self.n_heads
            if self.head_dim is not None:
                return max(1, d_model // self.head_dim)
            return largest_divisor(d_model, max(1, d_model // _HEAD))

        @property
        def key_dim(self) -> int:
            """Return head_dim with its default resolved."""
            return self._key_dim_at(self.d_model)

        def _key_dim_at(self, d_model: int) -> int:
            return self.head_dim if self.head_dim is not None else max(1, d_model // self._heads_at(d_model))

        @property
        def value_dim(self) -> int:
            """Return value_head_dim with its default resolved."""
            return self.value_head_dim if self.value_head_dim is not None else self.key_dim

        @property
        def rank(self) -> int:
            """Return decay_rank with its default resolved."""
            return self.decay_rank if self.decay_rank is not None else self.default_rank(self.d_model)

        def default_rank(self, d_model: int) -> int:
            """Return the inner width of decay and gate at a width of the model."""
            values = self.value_head_dim if self.value_head_dim is not None else self._key_dim_at(d_model)
            return min(values, max(1, d_model // 4))  # the first in the paper, 128 of 2304

        @property
        def shape(self) -> RecurrenceShape:
            keys = self.heads * self.key_dim
            gate_rank = self.gate_rank if self.gate_rank is not None else self.default_rank(self.d_model)
            return RecurrenceShape(
                d_model=self.d_model,
                key_heads=self.heads,
                value_heads=self.heads,
                key_dim=self.key_dim,
                value_dim=self.value_dim,
                mixed=2 * keys + self.heads * self.value_dim,
                decay_in=self.rank or keys,
                taps=self.d_conv,
                conv_bias=self.conv_bias,
                gate=self.gate,
                gate_rank=0 if self.gate == "none" else gate_rank,
                norm_eps=self.norm_eps,
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            keys = self.heads * self.key_dim
            return self.shape.cost(dtype_bytes, matrices=self.rank * keys, vectors=self.heads + keys)

        def canonical(self) -> dict[str, Any]:
            fields = {**self.to_dict(), "n_heads": self.heads, "head_dim": self.key_dim, "decay_rank": self.rank}
            fields |= {"value_head_dim": self.value_dim, "gate_rank": self.shape.gate_rank}
            return {name: value for name, value in fields.items() if name != "gate_rank" or self.gate != "none"}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        keys = config.heads * config.key_dim
        self.decay_proj = nn.Linear(config.rank, keys, bias=False) if config.rank else None
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 2, "head_dim": 6, "value_head_dim": 5, "conv_bias": True, "d_conv": 2}),
            Variant(fields={"n_heads": 2, "gate_lower_bound": -5.0, "decay_rank": 3, "gate_rank": 2, "gate": "silu"}),
            Variant(fields={"head_dim": 4, "negative_eigenvalues": True, "decay_rank": 0, "gate_rank": 0}),
            Variant(fields={"gate": "none", "d_conv": 0}),
        ]

    def recur(
        self,
        u_BLC: Tensor,
        decay_BLX: Tensor,
        beta_BLH: Tensor | None,
        memory_BHKV: Tensor | None,
        segments_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        config: KimiDelta.Config = self.config
        q_BLHK, k_BLHK, v_BLHV = self.heads_of(u_BLC)
        if self.decay_proj is not None:
            decay_BLX = self.decay_proj(decay_BLX)
        raw_BLHK = torch.unflatten(decay_BLX, -1, (config.heads, config.key_dim))
        A_H1, bias_HK = self.A_log[:, None], self.dt_bias.view(config.heads, config.key_dim)
        if config.gate_lower_bound is None:
            log_BLHK = softplus_decay(raw_BLHK, A_H1, bias_HK)
        else:
            wide = torch.promote_types(self.A_log.dtype, torch.float32)
            rate_BLHK = A_H1.to(wide).exp() * (raw_BLHK.to(wide) + bias_HK.to(wide))
            log_BLHK = config.gate_lower_bound * rate_BLHK.sigmoid()
        if config.negative_eigenvalues and beta_BLH is not None:
            beta_BLH = 2 * beta_BLH
        return self.run(self.unit(q_BLHK), self.unit(k_BLHK), v_BLHV, log_BLHK, beta_BLH, memory_BHKV, segments_BL)

    def step(self) -> tuple[Weights, Form]:
        bound = self.config.gate_lower_bound
        form = self.shape.form(
            decay="softplus" if bound is None else "bounded",
            decay_by=bound or 0.0,
            beta=2.0 if self.config.negative_eigenvalues else 1.0,
            feature_map="l2",
        )
        decay_proj = None if self.decay_proj is None else self.decay_proj.weight
        return self.weights(decay_proj=decay_proj, A_log=self.A_log, dt_bias=self.dt_bias), form

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return those of the second matrices of decay and gate, whose fan-in is a rank."""
        config: KimiDelta.Config = self.config
        default = matrix(config.default_rank(config.d_model) / config.default_rank(base_width))
        parts = {"decay_proj": (self.decay_proj, config.decay_rank), "gate_proj": (self.gate_proj, config.gate_rank)}
        return {
            f"{name}.weight": default if rank is None else matrix(1.0)
            for name, (part, rank) in parts.items()
            if part is not None
        }

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw plain PyTorch linears and the authors' decays: steps in [1e-3, 1e-1], -A in [1, 16], 1 with a bound."""
        super().reset_parameters(init_scale)
        if self.decay_proj is not None:
            self.decay_proj.reset_parameters()
        with torch.no_grad():
            if self.config.gate_lower_bound is None:
                self.A_log.uniform_(_A_MIN, _A_MAX).log_()
            else:
                self.A_log.zero_()
            draw_dt_bias_(self.dt_bias)
