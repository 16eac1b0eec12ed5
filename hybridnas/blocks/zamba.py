"""Zamba's block, letter Z: attention and an MLP on [x, embedding], to be shared by several layers (2405.16712).

Shapes: B batch, L length, D d_model, C = 2 D, H query heads, K key and value heads, P head_dim, T cached positions,
F d_ff, R inner width of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from hybridnas.blocks.attention import AttentionState
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.kernels.activations import ACTIVATIONS
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, truncated_normal_
from hybridnas.layers.norms import RMSNorm
from hybridnas.layers.rotary import rotate, rotation
from hybridnas.layers.segments import rotation_by_document
from hybridnas.layers.softmax_attention import scored_pairs, scored_width, softmax_attention
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block


@register_block("Z", name="zamba")
class Zamba(Block):
    """y = linear(mlp(norm(attention(norm([x, embedding]))))), softmax(q k^T / sqrt(P / 2)) over all tokens.

    Layers that share it with ``@`` have each a ``linear`` of their own and, where ranks are given, low-rank adapters of
    queries, keys, values and of the MLP's first matrix. With ``skip`` it returns x + y, for the mixer behind it in a
    branch: ``[Z{skip=true,norm_position=post}@sM]`` is x + M(norm(x + y)), Zamba's hybrid layer. Sources: arXiv
    2405.16712, section 3.1 and equation 6; adapters 2411.15242, section 2; equal to transformers' Zamba2HybridLayer.
    """

    role = "attention"
    outputs = ("own.linear",)

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of Zamba's block."""

        n_heads: int | None = option(
            None, "query heads; none: of 64 channels, so many as make an even width of 2 d_model [count]", ge=1
        )
        n_kv_heads: int | None = option(None, "key and value heads, a divisor of n_heads; none: n_heads [count]", ge=1)
        head_dim: int | None = option(None, "width of one head; none: 2 * d_model / n_heads [channels]", ge=1)
        positions: str = option("none", "position information: rotary, or none", choices=("rope", "none"))
        rope_base: float = option(10000.0, "base of the rotary wavelengths", gt=0)
        d_ff: int | None = option(None, "hidden width of the gated MLP; none: 4 * d_model [channels]", ge=1)
        activation: str = option("gelu", "nonlinearity of the MLP's gate", choices=tuple(ACTIVATIONS))
        mlp_rank: int = option(0, "inner width of each place's adapter of the MLP; 0: none [channels]", ge=0)
        attention_rank: int = option(
            0, "the same of its adapters of queries, keys and values; 0: none [channels]", ge=0
        )
        norm_eps: float = option(1e-5, "epsilon of both norms", gt=0)
        skip: bool = option(False, "return x + y in place of y, to be read by the next block of a branch")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.head_dim is None and 2 * self.d_model % self.heads:
                raise ConfigError(
                    f"{self.label()} n_heads={self.heads} does not divide 2 * d_model={2 * self.d_model}; use a "
                    f"divisor, or give head_dim",
                    field="n_heads",
                    got=self.heads,
                    allowed=f"a divisor of {2 * self.d_model}",
                )
            if self.heads % self.kv_heads:
                raise ConfigError(
                    f"{self.label()} n_kv_heads={self.kv_heads} does not divide n_heads={self.heads}; use a divisor",
                    field="n_kv_heads",
                    got=self.kv_heads,
                    allowed=[kv for kv in range(1, self.heads + 1) if self.heads % kv == 0],
                )
            if self.positions == "rope" and self.size % 2:
                raise ConfigError(
                    f"{self.label()} positions='rope' turns pairs of channels and needs an even head_dim, "
                    f"got {self.size}; give an even head_dim or use positions='none'",
                    field="head_dim",
                    got=self.size,
                    allowed="an even number",
                )

        @property
        def heads(self) -> int:
            """Return n_heads with its default resolved."""
            if self.n_heads is not None:
                return self.n_heads
            both = 2 * self.d_model
            if self.head_dim is not None:
                return max(1, both // self.head_dim)
            return next(h for h in range(max(1, both // 64), 0, -1) if both % (2 * h) == 0)

        @property
        def kv_heads(self) -> int:
            """Return n_kv_heads with its default resolved."""
            return self.n_kv_heads if self.n_kv_heads is not None else self.heads

        @property
        def size(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else 2 * self.d_model // self.heads

        @property
        def hidden(self) -> int:
            """Return d_ff with its default resolved."""
            return self.d_ff if self.d_ff is not None else 4 * self.d_model

        @property
        def columns(self) -> tuple[int, int, int]:
            """Return the channels of queries, keys and values."""
            return self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size

        @property
        def own_params(self) -> int:
            d, adapted = self.d_model, sum(2 * self.d_model + width for width in self.columns)
            return d * d + self.attention_rank * adapted + self.mlp_rank * (d + 2 * self.hidden)

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            d, heads, size = self.d_model, self.heads, self.size
            matrices = 2 * d * sum(self.columns) + heads * size * d + 3 * d * self.hidden + self.own_params
            scores = (
                2.0
                * scored_pairs(seq_len, None)
                / max(1, seq_len)
                * heads
                * scored_width(size, size, written_out=False)
            )
            return Cost(
                params=matrices + 3 * d,  # norms of [x, embedding] and of the MLP's input
                active_params=matrices + 3 * d,
                flops_per_token=2.0 * matrices + scores,
                state_bytes=2 * self.kv_heads * size * seq_len * dtype_bytes,
            )

        def canonical(self) -> dict[str, Any]:
            resolved = {"n_heads": self.heads, "n_kv_heads": self.kv_heads, "head_dim": self.size, "d_ff": self.hidden}
            fields = {**self.to_dict(), **resolved}
            return {name: value for name, value in fields.items() if name != "rope_base" or self.positions == "rope"}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        d, hidden = config.d_model, config.hidden
        self.norm, self.ff_norm = (RMSNorm(width, config.norm_eps, impl=impl) for width in (2 * d, d))
        self.qkv_proj = nn.Linear(2 * d, sum(config.columns), bias=False)
        self.out_proj = nn.Linear(config.heads * config.size, d, bias=False)
        self.up_proj = nn.Linear(d, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)
        self.own = OwnWeights(config)
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "positions": "rope", "mlp_rank": 3, "d_ff": 24}),
            Variant(fields={"n_heads": 2, "attention_rank": 3, "activation": "silu", "skip": True}),
        ]

    def forward(
        self,
        x_BLD: Tensor,
        state: State | None = None,
        segments_BL: Tensor | None = None,
        embedding_BLD: Tensor | None = None,
        own: OwnWeights | None = None,
    ) -> BlockOutput:
        own = self.own if own is None else own
        both_BLC = self.norm(torch.cat([x_BLD, x_BLD if embedding_BLD is None else embedding_BLD], dim=-1))
        y_BLD, after = self._attend(both_BLC, own, cast("AttentionState | None", state), segments_BL)
        read_BLD = self.ff_norm(y_BLD)
        inner_BLF = self.up_proj(read_BLD)
        if own.up is not None:
            inner_BLF = inner_BLF + own.up(read_BLD)
        gate_BLF, up_BLF = inner_BLF.chunk(2, dim=-1)
        y_BLD = own.linear(self.down_proj(ACTIVATIONS[self.config.activation](gate_BLF) * up_BLF))
        return BlockOutput(x_BLD + y_BLD if self.config.skip else y_BLD, after)

    def _attend(
        self, both_BLC: Tensor, own: OwnWeights, state: AttentionState | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, AttentionState | None]:
        config: Zamba.Config = self.config
        parts = list(self.qkv_proj(both_BLC).split(config.columns, dim=-1))
        if own.qkv is not None:
            parts = [part + adapter(both_BLC) for part, adapter in zip(parts, own.qkv, strict=True)]
        q_BHLP, k_BKLP, v_BKLP = (part.unflatten(-1, (-1, config.size)).transpose(1, 2) for part in parts)
        past = 0 if state is None else state.k_BKTP.shape[2]
        q_BHLP, k_BKLP = (self._turned(part, past, segments_BL) for part in (q_BHLP, k_BKLP))
        if state is not None:
            k_BKLP = torch.cat([state.k_BKTP.to(k_BKLP.dtype), k_BKLP], dim=2)
            v_BKLP = torch.cat([state.v_BKTP.to(v_BKLP.dtype), v_BKLP], dim=2)
            state = AttentionState(k_BKLP, v_BKLP)
        y_BHLP = softmax_attention(
            q_BHLP, k_BKLP, v_BKLP, scale=(config.size / 2) ** -0.5, segments_BL=segments_BL, impl=self.impl
        )
        return self.out_proj(y_BHLP.transpose(1, 2).flatten(-2)), state

    def _turned(self, x_BHLP: Tensor, start: int, segments_BL: Tensor | None) -> Tensor:
        """Return queries or keys turned by their positions, from ``start`` on, or from 0 in each document."""
        config: Zamba.Config = self.config
        if config.positions != "rope":
            return x_BHLP
        if segments_BL is not None:
            cos_BLh, sin_BLh = rotation_by_document(segments_BL, config.size, config.rope_base)
            return rotate(x_BHLP, cos_BLh[:, None], sin_BLh[:, None])
        return rotate(x_BHLP, *rotation(start, x_BHLP.shape[2], config.size, config.rope_base, x_BHLP.device))

    def own_weights(self, init_scale: float) -> nn.Module | None:
        own = OwnWeights(self.config)
        own.reset_parameters(init_scale)
        return own

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        shape = (batch_size, self.config.kv_heads, 0, self.config.size)
        return AttentionState(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal matrices and norms of 1; adapters add nothing at first."""
        for linear in (self.qkv_proj, self.out_proj, self.up_proj, self.down_proj):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
        for norm in (self.norm, self.ff_norm):
            norm.reset_parameters()
        self.own.reset_parameters(init_scale)

    def implementations(self, device: torch.device) -> dict[str, str]:
        if self.impl is Impl.REFERENCE:
            return {"attention": "reference: all scores written out"}
        return {"attention": "torch scaled_dot_product_attention"}


class OwnWeights(nn.Module):
    """What each place of a shared block has for itself: the last linear layer, and adapters."""

    def __init__(self, config: Zamba.Config) -> None:
        super().__init__()
        d = config.d_model
        self.linear = nn.Linear(d, d, bias=False)
        self.qkv = self.up = None
        if rank := config.attention_rank:
            self.qkv = nn.ModuleList(_adapter(2 * d, rank, width) for width in config.columns)
        if rank := config.mlp_rank:
            self.up = _adapter(d, rank, 2 * config.hidden)

    def adapters(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """Return the two layers of each adapter that there is."""
        found = [*([] if self.qkv is None else self.qkv), *([] if self.up is None else [self.up])]
        return [cast("tuple[nn.Linear, nn.Linear]", tuple(cast(nn.Sequential, adapter))) for adapter in found]

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        """Draw truncated-normal matrices; the second of an adapter is 0."""
        for linear in (self.linear, *(first for first, _ in self.adapters())):
            truncated_normal_(linear.weight, linear.in_features, init_scale)
        for _, second in self.adapters():
            nn.init.zeros_(second.weight)

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return those of the adapters' second matrices, whose fan-in is a rank that does not grow."""
        names = [name for name, _ in self.named_parameters() if name.endswith(".1.weight")]
        return {name: matrix(1.0) for name in names}


def _adapter(d_in: int, rank: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False))
