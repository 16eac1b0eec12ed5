"""Causal self-attention, letter A: multi-head or grouped-query, rotary positions or none, KV cache as the state.

Shapes: B batch, L length, D d_model, H query heads, K key and value heads, P head_dim, T cached positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.mode import is_plain_eager
from hybridnas.layers.norms import one_row
from hybridnas.registry import register_block


@exportable
class AttentionState(NamedTuple):
    """Keys (rotated already) and values of all positions read so far."""

    k_BKTP: Tensor
    v_BKTP: Tensor


@register_block("A", name="attention", aliases=("*",))
class Attention(Block):
    """Softmax attention with one fused QKV matrix (Vaswani 2017; grouped queries: Ainslie 2023; rotary: Su 2021)."""

    role = "attention"

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the attention block."""

        n_heads: int | None = option(None, "query heads; none: of 64 channels where that divides d_model [count]", ge=1)
        n_kv_heads: int | None = option(None, "key and value heads, a divisor of n_heads; none: n_heads [count]", ge=1)
        head_dim: int | None = option(None, "width of one head; none: d_model / n_heads [channels]", ge=1)
        positions: str = option("rope", "position information: rotary, or none", choices=("rope", "none"))
        rope_base: float = option(10000.0, "base of the rotary wavelengths", gt=0)
        bias: bool = option(False, "biases on both linear layers")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head_dim is None and self.d_model % self.heads:
                divisors = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
                near = sorted(sorted(divisors, key=lambda h: abs(h - self.heads))[:2])
                raise ConfigError(
                    f"{self.label()} n_heads={self.heads} does not divide d_model={self.d_model}; "
                    f"use n_heads={' or '.join(map(str, near))}, or give head_dim",
                    field="n_heads",
                    got=self.heads,
                    allowed=divisors,
                )
            if self.heads % self.kv_heads:
                raise ConfigError(
                    f"{self.label()} n_kv_heads={self.kv_heads} does not divide n_heads={self.heads}; "
                    f"use a divisor of n_heads",
                    field="n_kv_heads",
                    got=self.kv_heads,
                    allowed=[kv for kv in range(1, self.heads + 1) if self.heads % kv == 0],
                )
            if self.positions == "rope" and self.head_width % 2:
                raise ConfigError(
                    f"{self.label()} positions='rope' turns pairs of channels and needs an even head_dim, "
                    f"got {self.head_width}; give an even head_dim or use positions='none'",
                    field="head_dim",
                    got=self.head_width,
                    allowed="an even number",
                )

        @property
        def heads(self) -> int:
            """Return n_heads, by default near d_model / 64 and lowered until heads of even width fill d_model."""
            if self.n_heads is not None:
                return self.n_heads
            if self.head_dim is not None:
                return max(1, self.d_model // self.head_dim)
            most, kv = max(1, self.d_model // 64), self.n_kv_heads or 1
            fits = (h for h in range(most, 0, -1) if self.d_model % (2 * h) == 0 and h % kv == 0)
            return next(fits, 1)

        @property
        def kv_heads(self) -> int:
            """Return n_kv_heads with its default resolved."""
            return self.n_kv_heads if self.n_kv_heads is not None else self.heads

        @property
        def head_width(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else self.d_model // self.heads

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            """Count scores and values over all seq_len keys for every query, as torch's flop counter does."""
            heads, kv, width = self.heads, self.kv_heads, self.head_width
            qkv = (heads + 2 * kv) * width
            matrices = self.d_model * qkv + heads * width * self.d_model
            params = matrices + (qkv + self.d_model if self.bias else 0)
            return Cost(
                params=params,
                active_params=params,
                flops_per_token=2.0 * matrices + 4.0 * seq_len * heads * width,
                state_bytes=2 * seq_len * kv * width * dtype_bytes,
            )

        def canonical(self) -> dict[str, Any]:
            resolved = {"n_heads": self.heads, "n_kv_heads": self.kv_heads, "head_dim": self.head_width}
            fields = {**self.to_dict(), **resolved}
            if self.positions != "rope":
                del fields["rope_base"]
            return fields

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        query, self._kv_width = config.heads * config.head_width, config.kv_heads * config.head_width
        self.qkv_proj = nn.Linear(config.d_model, query + 2 * self._kv_width, bias=config.bias)
        self.out_proj = nn.Linear(query, config.d_model, bias=config.bias)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 4}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "bias": True}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 1, "positions": "none"}),
            Variant(fields={"n_heads": 3, "head_dim": 6, "rope_base": 500.0}),
        ]

    def forward(self, x_BLD: Tensor, state: State | None = None) -> BlockOutput:
        config: Attention.Config = self.config
        width = config.head_width
        parts = self.qkv_proj(x_BLD).split([config.heads * width, self._kv_width, self._kv_width], dim=-1)
        q_BHLP, k_BKLP, v_BKLP = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
        past = 0 if state is None else cast(AttentionState, state).k_BKTP.shape[2]
        if config.positions == "rope":
            cos_LP, sin_LP = self._rotation(past, x_BLD.shape[1], x_BLD.device)
            q_BHLP, k_BKLP = _rotate(q_BHLP, cos_LP, sin_LP), _rotate(k_BKLP, cos_LP, sin_LP)
        if state is not None:
            before = cast(AttentionState, state)
            k_BKLP = torch.cat([before.k_BKTP.to(k_BKLP.dtype), k_BKLP], dim=2)
            v_BKLP = torch.cat([before.v_BKTP.to(v_BKLP.dtype), v_BKLP], dim=2)
            state = AttentionState(k_BKLP, v_BKLP)
        y_BHLP = F.scaled_dot_product_attention(
            q_BHLP,
            k_BKLP,
            v_BKLP,
            attn_mask=_mask(x_BLD.shape[1], past, x_BLD.device),
            is_causal=bool(past == 0 and x_BLD.shape[1] > 1),  # a symbolic length compares to a symbol
            enable_gqa=config.heads != config.kv_heads,
        )
        return BlockOutput(self.out_proj(y_BHLP.transpose(1, 2).flatten(2)), state)

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not Attention.forward or not is_plain_eager(state[0].device):
            return None
        return _Cached(self, norm, cast(AttentionState, state))

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch_size, self.config.kv_heads, 0, self.config.head_width)
        return AttentionState(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        for linear in (self.qkv_proj, self.out_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def implementations(self, device: torch.device) -> dict[str, str]:
        return {"attention": "torch scaled_dot_product_attention"}

    def _rotation(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        half = self.config.head_width // 2
        frequency_P = self.config.rope_base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        angle_LP = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * frequency_P
        return angle_LP.cos(), angle_LP.sin()


class _Cached:
    """``x + attention(norm(x))`` for token after token; its cache has room ahead, so that a token copies no others."""

    def __init__(self, block: Attention, norm: nn.Module, state: AttentionState) -> None:
        self._block, self._norm = block, one_row(norm)
        self._k_BKTP, self._v_BKTP = state
        self._read = state.k_BKTP.shape[2]
        self._grow()

    def __call__(self, x_BD: Tensor) -> Tensor:
        block, config, at = self._block, self._block.config, self._read
        width = config.head_width
        parts = block.qkv_proj(self._norm(x_BD)).split([config.heads * width, *[block._kv_width] * 2], dim=-1)
        q_BHP, k_BKP, v_BKP = (part.unflatten(-1, (-1, width)) for part in parts)
        if at == self._k_BKTP.shape[2]:
            self._grow()
        if config.positions == "rope":
            cos_P, sin_P = self._cos_TP[at], self._sin_TP[at]
            q_BHP, k_BKP = _rotate(q_BHP, cos_P, sin_P), _rotate(k_BKP, cos_P, sin_P)
        self._k_BKTP[:, :, at], self._v_BKTP[:, :, at] = k_BKP, v_BKP
        self._read = at + 1
        y_BHLP = F.scaled_dot_product_attention(
            q_BHP[:, :, None],
            self._k_BKTP[:, :, : at + 1].to(q_BHP.dtype),
            self._v_BKTP[:, :, : at + 1].to(q_BHP.dtype),
            enable_gqa=config.heads != config.kv_heads,
        )
        y_BD: Tensor = block.out_proj(y_BHLP.flatten(1))
        return x_BD + y_BD

    def _grow(self) -> None:
        """Make room for half as many positions again, at least 64."""
        kept = self._read
        size = kept + max(64, kept // 2)
        for name in ("_k_BKTP", "_v_BKTP"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], size, old.shape[3])
            new[:, :, :kept] = old[:, :, :kept]
            setattr(self, name, new)
        if self._block.config.positions == "rope":
            self._cos_TP, self._sin_TP = self._block._rotation(0, size, self._k_BKTP.device)


def _mask(length: int, past: int, device: torch.device) -> Tensor | None:
    """Return which keys (past + length) each query may see; None where is_causal or a single query says it all."""
    if past == 0 or length == 1:
        return None
    return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)


def _rotate(x_BHLP: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
    """Turn channel pairs (i, i + P/2) by their position's angles, in float32."""
    first, second = x_BHLP.chunk(2, dim=-1)
    turned = torch.cat([first * cos_LP - second * sin_LP, second * cos_LP + first * sin_LP], dim=-1)
    return turned.to(x_BHLP.dtype)
