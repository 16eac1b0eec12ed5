"""Gated DeltaNet block, letter G: a delta rule whose memory decays, one decay per head (Yang, Kautz, Hatamizadeh 2024).

Shapes: B batch, L length, D d_model, G key heads, H value heads, K key channels and V value channels of a head,
C channels of the convolution.
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
    softplus_decay,
)
from hybridnas.registry import register_block

_KEY_SHARE = 0.75  # of d_model in the keys of all heads: 6 d_model^2 weights with values twice as wide
_HEAD = 64  # key channels of a head by default; the released models have 96 to 256
_A_MIN, _A_MAX = 0.01, 16.0  # range of -A at initialisation; the authors' from 0, which has no logarithm


@register_block("G", name="gated_deltanet")
class GatedDeltaNet(LinearRecurrence):
    """S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, o_t = S_t^T q_t / sqrt(K).

    q, k and v pass a short convolution with SiLU, q and k have unit length; g = -exp(A_log) softplus(a + dt_bias) and
    beta = sigmoid(b), one of each per value head; out_proj(rmsnorm(o) silu(z)). Source: arXiv 2412.06464, figure 1;
    as in transformers' Qwen3Next, Qwen3.5 and OLMo-Hybrid. ``in_proj`` holds the rows of q, k, v, z, a and b.
    """

    float32 = ("A_log", "dt_bias")
    no_decay = ("A_log", "dt_bias")

    @dataclass(frozen=True, kw_only=True)
    class Config(RecurrenceConfig):
        """Fields of the Gated DeltaNet block."""

        n_heads: int | None = option(
            None, "query and key heads; none: as many of 64 channels as are 3/4 of d_model [count]", ge=1
        )
        n_value_heads: int | None = option(
            None, "value heads, a multiple of n_heads, which share its keys; none: n_heads [count]", ge=1
        )
        head_dim: int | None = option(
            None, "key channels of a head; none: 3/4 of d_model over n_heads [channels]", ge=1, sizable=True
        )
        value_head_dim: int | None = option(
            None, "value channels of a head; none: 2 head_dim over value heads per key head [channels]", ge=1
        )
        d_conv: int = option(4, "taps of the causal convolution of q, k and v; 0: SiLU alone [tokens]", ge=0)
        conv_bias: bool = option(False, "bias of the convolution")
        negative_eigenvalues: bool = option(False, "beta in [0, 2] in place of [0, 1] (arXiv 2411.12537)")
        gate: str = option("silu", "activation of the output gate, or none", choices=("silu", "sigmoid", "none"))
        norm_eps: float = option(1e-5, "epsilon of the output norm", gt=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.value_heads % self.heads:
                raise ConfigError(
                    f"{self.label()} n_value_heads={self.value_heads} is no multiple of n_heads={self.heads}; "
                    f"use a multiple, or a divisor of {self.value_heads} for n_heads",
                    field="n_value_heads",
                    got=self.value_heads,
                    allowed=f"a multiple of {self.heads}",
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
            if self.n_heads is not None:
                return self.n_heads
            return max(1, round(_KEY_SHARE * self.d_model / (self.head_dim or _HEAD)))

        @property
        def value_heads(self) -> int:
            """Return n_value_heads with its default resolved."""
            return self.n_value_heads if self.n_value_heads is not None else self.heads

        @property
        def key_dim(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else max(1, round(_KEY_SHARE * self.d_model / self.heads))

        @property
        def value_dim(self) -> int:
            """Return value_head_dim with its default resolved."""
            if self.value_head_dim is not None:
                return self.value_head_dim
            return max(1, 2 * self.key_dim * self.heads // self.value_heads)

        @property
        def shape(self) -> RecurrenceShape:
            keys = self.heads * self.key_dim
            return RecurrenceShape(
                d_model=self.d_model,
                key_heads=self.heads,
                value_heads=self.value_heads,
                key_dim=self.key_dim,
                value_dim=self.value_dim,
                mixed=2 * keys + self.value_heads * self.value_dim,
                decay_in=self.value_heads,
                taps=self.d_conv,
                conv_bias=self.conv_bias,
                gate=self.gate,
                norm_eps=self.norm_eps,
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            return self.shape.cost(dtype_bytes, vectors=2 * self.value_heads)  # A_log, dt_bias

        def canonical(self) -> dict[str, Any]:
            resolved = {"n_heads": self.heads, "n_value_heads": self.value_heads, "head_dim": self.key_dim}
            return {**self.to_dict(), **resolved, "value_head_dim": self.value_dim}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.A_log = nn.Parameter(torch.empty(config.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.value_heads))
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 2, "n_value_heads": 4, "head_dim": 6, "value_head_dim": 5, "conv_bias": True}),
            Variant(fields={"n_heads": 3, "head_dim": 4, "negative_eigenvalues": True, "gate": "sigmoid", "d_conv": 1}),
            Variant(fields={"head_dim": 8, "gate": "none", "d_conv": 0}),
        ]

    def recur(
        self,
        u_BLC: Tensor,
        decay_BLX: Tensor,
        beta_BLH: Tensor | None,
        memory_BHKV: Tensor | None,
        segments_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        q_BLGK, k_BLGK, v_BLHV = self.heads_of(u_BLC)
        log_BLH = softplus_decay(decay_BLX, self.A_log, self.dt_bias)
        if self.config.negative_eigenvalues and beta_BLH is not None:
            beta_BLH = 2 * beta_BLH
        return self.run(self.unit(q_BLGK), self.unit(k_BLGK), v_BLHV, log_BLH, beta_BLH, memory_BHKV, segments_BL)

    def step(self) -> tuple[Weights, Form]:
        beta = 2.0 if self.config.negative_eigenvalues else 1.0
        form = self.shape.form(decay="softplus", beta=beta, feature_map="l2")
        return self.weights(A_log=self.A_log, dt_bias=self.dt_bias), form

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw plain PyTorch linears and the authors' decays: -A uniform up to 16, steps in [1e-3, 1e-1]."""
        super().reset_parameters(init_scale)
        with torch.no_grad():
            self.A_log.uniform_(_A_MIN, _A_MAX).log_()
            draw_dt_bias_(self.dt_bias)
