"""Causal self-attention, letter A: multi-head, grouped-query or latent; window, gate, norms and positions as options.

Shapes: B batch, L length, D d_model, H query heads, K key and value heads, P head_dim, T cached positions, V width of
a value (P, but for latent attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.layers.block import Block, BlockConfig, BlockOutput, State, Variant, exportable, truncated_normal_
from hybridnas.layers.latent_attention import LatentAttention, LatentCache, LatentShape, LatentState, next_capacity
from hybridnas.layers.mode import has_hooks, is_plain_eager
from hybridnas.layers.norms import RMSNorm, ZeroCenteredRMSNorm, one_row
from hybridnas.layers.rotary import Angles, rotate, rotation
from hybridnas.layers.segments import rotation_by_document
from hybridnas.layers.softmax_attention import scored_pairs, scored_width, softmax_attention
from hybridnas.layers.width import WidthRule
from hybridnas.registry import register_block

_Norm = Callable[[Tensor], Tensor]


@exportable
class AttentionState(NamedTuple):
    """Keys and values of all positions read so far, or of the last ``window``.

    The keys are turned already; under a window they are not, since only their places in it are known.
    """

    k_BKTP: Tensor
    v_BKTP: Tensor


@register_block("A", name="attention", aliases=("*",))
class Attention(Block):
    """Softmax attention with one fused QKV matrix (Vaswani 2017; grouped queries: Ainslie 2023; rotary: Su 2021).

    Options: a sliding window (Mistral, 2310.06825); an output gate (2505.06708); norms of queries and keys
    (2302.05442); rotary positions on a part of each head; a capped score (Gemma 2, 2408.00118); a sink per head
    (gpt-oss, 2508.10925); and multi-head latent attention (DeepSeek-V2, 2405.04434), whose cache holds
    ``kv_rank + rope_dim`` numbers a token. Letter S is this block with a window.
    """

    role = "attention"

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """Fields of the attention block."""

        n_heads: int | None = option(None, "query heads; none: of 64 channels where that divides d_model [count]", ge=1)
        n_kv_heads: int | None = option(None, "key and value heads, a divisor of n_heads; none: n_heads [count]", ge=1)
        head_dim: int | None = option(None, "width of one head; none: d_model / n_heads [channels]", ge=1, sizable=True)
        positions: str = option("rope", "position information: rotary, or none", choices=("rope", "none"))
        rope_base: float = option(10000.0, "base of the rotary wavelengths", gt=0)
        rotary_fraction: float = option(1.0, "part of a head's channels, the first ones, that turn [1]", gt=0, le=1)
        window: int | None = option(
            None, "latest positions that a query sees, its own among them; none: all [tokens]", ge=1
        )
        gate: str = option(
            "none",
            "sigmoid gate on the heads' results, computed from the block's input: per channel, or one per head",
            choices=("none", "elementwise", "head"),
        )
        qk_norm: str = option(
            "none",
            "RMSNorm of queries and keys before their rotation: of each head, or of all heads together",
            choices=("none", "head", "all"),
        )
        qk_norm_zero_centered: bool = option(False, "these norms multiply by 1 + weight")
        norm_eps: float = option(1e-6, "epsilon of the norms of queries, keys and latents", gt=0)
        scale: float | None = option(None, "factor on the scores; none: (channels of a query) ** -0.5 [1]", gt=0)
        softcap: float | None = option(None, "a score s becomes c * tanh(s / c); none: s itself", gt=0)
        sink: bool = option(False, "a learned logit per head takes part in the softmax and brings no value")
        bias: bool = option(False, "biases on all linear layers")
        qkv_bias: bool | None = option(None, "biases on queries, keys, values and gate; none: as bias")
        out_bias: bool | None = option(None, "bias on the output projection; none: as bias")
        kv_rank: int | None = option(
            None,
            "latent attention: width of the latent that keys and values are made of; none: no latent [channels]",
            ge=1,
        )
        q_rank: int | None = option(None, "width of a latent of the queries; none: no latent [channels]", ge=1)
        rope_dim: int | None = option(
            None, "latent attention: channels of a head beside head_dim whose key is shared; none: head_dim / 2", ge=0
        )
        v_head_dim: int | None = option(None, "latent attention: width of a value; none: head_dim [channels]", ge=1)

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
            if self.kv_rank is None:
                self._check_heads()
            else:
                self._check_latents()

        def _check_heads(self) -> None:
            for name in ("q_rank", "rope_dim", "v_head_dim"):
                if (got := getattr(self, name)) is not None:
                    raise ConfigError(
                        f"{self.label()} {name}={got} is an option of latent attention and kv_rank is none; "
                        f"give kv_rank too, or leave {name} out",
                        field=name,
                        got=got,
                        allowed=None,
                    )
            if self.positions != "rope":
                return
            if self.head_width % 2 and self.rotary_fraction == 1:
                raise ConfigError(
                    f"{self.label()} positions='rope' turns pairs of channels and needs an even head_dim, "
                    f"got {self.head_width}; give an even head_dim or use positions='none'",
                    field="head_dim",
                    got=self.head_width,
                    allowed="an even number",
                )
            if self.rotary % 2 or self.rotary == 0:
                raise ConfigError(
                    f"{self.label()} rotary_fraction={self.rotary_fraction:g} turns {self.rotary} of the "
                    f"head_dim={self.head_width} channels, and channels turn in pairs; "
                    f"use a fraction that gives an even number of at least 2",
                    field="rotary_fraction",
                    got=self.rotary_fraction,
                    allowed=f"an even number of channels / {self.head_width}",
                )

        def _check_latents(self) -> None:
            without = {
                "window": (self.window, None),
                "n_kv_heads": (self.n_kv_heads if self.n_kv_heads != self.heads else None, None),
                "qk_norm": (self.qk_norm, "none"),
                "rotary_fraction": (self.rotary_fraction, 1.0),
            }
            for name, (got, allowed) in without.items():
                if got != allowed:
                    raise ConfigError(
                        f"{self.label()} {name}={got} does not go with latent attention (kv_rank={self.kv_rank}), "
                        f"whose heads share one latent of all positions; leave out {name} or kv_rank",
                        field=name,
                        got=got,
                        allowed=allowed,
                    )
            if self.positions == "rope" and (self.rotary % 2 or self.rotary == 0):
                raise ConfigError(
                    f"{self.label()} rope_dim={self.rotary} with positions='rope' must be an even number of at least "
                    f"2, since channels turn in pairs; change rope_dim or use positions='none'",
                    field="rope_dim",
                    got=self.rotary,
                    allowed="an even number >= 2",
                )

        @property
        def heads(self) -> int:
            """Return n_heads, by default near d_model / 64 and lowered until heads of even width fill d_model."""
            return self._heads_at(self.d_model)

        def _heads_at(self, d_model: int) -> int:
            if self.n_heads is not None:
                return self.n_heads
            if self.head_dim is not None:
                return max(1, d_model // self.head_dim)
            most, kv = max(1, d_model // 64), self.n_kv_heads or 1
            fits = (h for h in range(most, 0, -1) if d_model % (2 * h) == 0 and h % kv == 0)
            return next(fits, 1)

        def head_growth(self, base_width: int) -> float:
            """Return how many times wider a head is than at another width of the model."""
            if self.head_dim is not None:
                return 1.0
            return self.head_width * self._heads_at(base_width) / base_width

        @property
        def kv_heads(self) -> int:
            """Return n_kv_heads with its default resolved."""
            return self.n_kv_heads if self.n_kv_heads is not None else self.heads

        @property
        def head_width(self) -> int:
            """Return head_dim with its default resolved."""
            return self.head_dim if self.head_dim is not None else self.d_model // self.heads

        @property
        def value_width(self) -> int:
            """Return the width of one head's result."""
            return self.v_head_dim if self.v_head_dim is not None else self.head_width

        @property
        def rotary(self) -> int:
            """Return the channels of a head that turn; of latent attention those beside head_dim, turned or not."""
            if self.kv_rank is None:
                return int(round(self.head_width * self.rotary_fraction, 6))
            return self.rope_dim if self.rope_dim is not None else 2 * max(1, self.head_width // 4)

        @property
        def biases(self) -> tuple[bool, bool]:
            """Return whether the projections of queries, keys and values have a bias, and whether the output's has."""
            qkv = self.bias if self.qkv_bias is None else self.qkv_bias
            return qkv, self.bias if self.out_bias is None else self.out_bias

        @property
        def gates(self) -> int:
            """Return how many gates a token has."""
            return {"none": 0, "head": self.heads, "elementwise": self.heads * self.value_width}[self.gate]

        @property
        def latent(self) -> LatentShape | None:
            """Return the sizes of latent attention, or None."""
            if self.kv_rank is None:
                return None
            return LatentShape(
                d_model=self.d_model,
                heads=self.heads,
                head=self.head_width,
                rotary=self.rotary,
                value=self.value_width,
                kv_rank=self.kv_rank,
                q_rank=self.q_rank,
                bias=self.biases[0],
                norm_eps=self.norm_eps,
                rope_base=self.rope_base if self.positions == "rope" else None,
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            """Count scores and values over all seq_len keys for every query, as torch's flop counter does.

            A window counts the keys of the blocks that are computed: ``scored_pairs``.
            """
            heads, kv, width, value = self.heads, self.kv_heads, self.head_width, self.value_width
            qkv_bias, out_bias = self.biases
            around = self.d_model * self.gates + heads * value * self.d_model
            extra = (self.gates if qkv_bias else 0) + (self.d_model if out_bias else 0) + (heads if self.sink else 0)
            latent = self.latent
            if latent is not None:
                matrices, params = latent.matrices, latent.params
                state, queries = latent.kv_rank + latent.rotary, width + latent.rotary
            else:
                qkv = (heads + 2 * kv) * width
                norms = {"none": 0, "head": 2 * width, "all": (heads + kv) * width}[self.qk_norm]
                matrices, params = self.d_model * qkv, self.d_model * qkv + norms + (qkv if qkv_bias else 0)
                state, queries = 2 * kv * width, width
            kept = seq_len if self.window is None else min(seq_len, self.window)
            written_out = self.softcap is not None or self.sink
            scored = scored_width(queries, value, written_out=written_out)
            keys = scored_pairs(seq_len, self.window, written_out=written_out) / max(1, seq_len)
            return Cost(
                params=params + around + extra,
                active_params=params + around + extra,
                flops_per_token=2.0 * (matrices + around) + 2.0 * keys * heads * scored,
                state_bytes=kept * state * dtype_bytes,
            )

        def canonical(self) -> dict[str, Any]:
            resolved = {"n_heads": self.heads, "n_kv_heads": self.kv_heads, "head_dim": self.head_width}
            fields = {**self.to_dict(), **resolved}
            qkv_bias, out_bias = self.biases
            fields["bias"] = qkv_bias and out_bias
            fields["qkv_bias"], fields["out_bias"] = (None, None) if qkv_bias == out_bias else (qkv_bias, out_bias)
            channels = self.head_width
            if self.kv_rank is not None:
                fields |= {"rope_dim": self.rotary, "v_head_dim": self.value_width}
                channels += self.rotary
            elif self.positions == "rope":
                fields["rotary_fraction"] = self.rotary / self.head_width
            if self.scale == channels**-0.5:
                fields["scale"] = None
            unused = [
                *(("rope_base", "rotary_fraction") if self.positions != "rope" else ()),
                *(("qk_norm_zero_centered",) if self.qk_norm == "none" else ()),
                *(("norm_eps",) if self.qk_norm == "none" and self.kv_rank is None else ()),
            ]
            return {name: value for name, value in fields.items() if name not in unused}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        qkv_bias, out_bias = config.biases
        width = config.head_width
        query, self._kv_width = config.heads * width, config.kv_heads * width
        self.latent: LatentAttention | None = None
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if (latent := config.latent) is not None:
            self.latent = LatentAttention(latent, scale=config.scale, softcap=config.softcap, impl=impl)
        else:
            self.qkv_proj = nn.Linear(config.d_model, query + 2 * self._kv_width, bias=qkv_bias)
            if config.qk_norm != "none":
                norm = ZeroCenteredRMSNorm if config.qk_norm_zero_centered else RMSNorm
                widths = (width, width) if config.qk_norm == "head" else (query, self._kv_width)
                self.q_norm, self.k_norm = (norm(size, config.norm_eps, impl=impl) for size in widths)
        self.gate_proj = nn.Linear(config.d_model, config.gates, bias=qkv_bias) if config.gates else None
        self.sinks = nn.Parameter(torch.empty(config.heads)) if config.sink else None
        self.out_proj = nn.Linear(config.heads * config.value_width, config.d_model, bias=out_bias)
        self.reset_parameters()

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of the queries where heads grow with the model: q k grows as a head's width, its scale as a root.

        Norms of queries and keys (``qk_norm``) hold the size of their product, so that nothing is left to do.
        """
        config: Attention.Config = self.config
        growth = config.head_growth(base_width)
        if growth == 1 or config.qk_norm != "none":
            return {}
        factor = growth**-0.5 if config.scale is None else 1 / growth
        rate = base_width / config.d_model
        if self.latent is None:
            return {"qkv_proj.weight": WidthRule(rate=rate, rows=config.heads * config.head_width, row_factor=factor)}
        name = "latent.down_proj.weight" if config.q_rank is None else "latent.q_up_proj.weight"
        return {name: WidthRule(rate=rate, rows=self.latent.shape.query, row_factor=factor)}

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        latent = {"n_heads": 4, "head_dim": 6, "kv_rank": 5, "rope_dim": 4}
        return [
            Variant(),
            Variant(fields={"n_heads": 4}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "bias": True}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 1, "positions": "none"}),
            Variant(fields={"n_heads": 3, "head_dim": 6, "rope_base": 500.0}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "window": 3}),
            Variant(fields={"n_heads": 4, "gate": "elementwise", "qk_norm": "head", "qk_norm_zero_centered": True,
                            "head_dim": 8, "rotary_fraction": 0.25}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "gate": "head", "qk_norm": "all", "qkv_bias": True}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "softcap": 1.5, "scale": 0.7, "out_bias": True}),
            Variant(fields={"n_heads": 4, "n_kv_heads": 2, "window": 5, "softcap": 1.5, "sink": True}),
            Variant(fields={"window": 4, "positions": "none", "sink": True}),
            Variant(fields=latent),
            Variant(fields={**latent, "q_rank": 7, "v_head_dim": 8, "bias": True, "gate": "head"}),
            Variant(fields={**latent, "positions": "none", "kv_rank": 12, "gate": "elementwise"}),
            Variant(fields={**latent, "softcap": 1.5, "sink": True, "rope_dim": 0, "positions": "none"}),
        ]  # fmt: skip

    def forward(self, x_BLD: Tensor, state: State | None = None, segments_BL: Tensor | None = None) -> BlockOutput:
        if self.latent is not None:
            y_BHLV, state = self.latent(x_BLD, cast("LatentState | None", state), self.sinks, segments_BL)
        else:
            y_BHLV, state = self._attend(x_BLD, cast("AttentionState | None", state), segments_BL)
        return BlockOutput(self._output(y_BHLV.transpose(1, 2), x_BLD), state)

    def _attend(
        self, x_BLD: Tensor, state: AttentionState | None, segments_BL: Tensor | None
    ) -> tuple[Tensor, AttentionState | None]:
        config: Attention.Config = self.config
        parts = self._project(x_BLD, self.q_norm, self.k_norm)
        q_BHLP, k_BKLP, v_BKLP = (part.transpose(1, 2) for part in parts)
        past, length = 0 if state is None else state.k_BKTP.shape[2], x_BLD.shape[1]
        if config.window is None:
            q_BHLP, k_BKLP = self._turned(q_BHLP, past, segments_BL), self._turned(k_BKLP, past, segments_BL)
        if state is not None:
            k_BKLP = torch.cat([state.k_BKTP.to(k_BKLP.dtype), k_BKLP], dim=2)
            v_BKLP = torch.cat([state.v_BKTP.to(v_BKLP.dtype), v_BKLP], dim=2)
            oldest = 0 if config.window is None else max(0, past + length - config.window)
            state = AttentionState(k_BKLP[:, :, oldest:], v_BKLP[:, :, oldest:])
        if config.window is not None:  # angles count from the oldest key that is there: only differences matter
            q_BHLP, k_BKLP = self._turned(q_BHLP, past, segments_BL), self._turned(k_BKLP, 0, segments_BL)
        y_BHLP = softmax_attention(
            q_BHLP,
            k_BKLP,
            v_BKLP,
            window=config.window,
            scale=config.scale,
            softcap=config.softcap,
            sink_H=self.sinks,
            segments_BL=segments_BL,
            impl=self.impl,
        )
        return y_BHLP, state

    def _project(self, x_BLD: Tensor, q_norm: _Norm | None, k_norm: _Norm | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, L, H, P), keys and values (B, L, K, P) of x (B, L, D), or without L, not turned yet."""
        config: Attention.Config = self.config
        width = config.head_width
        q, k, v = self.qkv_proj(x_BLD).split([config.heads * width, self._kv_width, self._kv_width], dim=-1)
        if q_norm is not None and k_norm is not None and config.qk_norm == "all":
            q, k = q_norm(q), k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, width)) for part in (q, k, v))
        if q_norm is not None and k_norm is not None and config.qk_norm == "head":
            q, k = q_norm(q), k_norm(k)
        return q, k, v

    def _turned(self, x_BHLP: Tensor, start: int, segments_BL: Tensor | None = None) -> Tensor:
        """Return queries or keys turned by their positions, from ``start`` on, or from 0 in each document."""
        config: Attention.Config = self.config
        if config.positions != "rope":
            return x_BHLP
        if segments_BL is not None:
            cos_BLh, sin_BLh = rotation_by_document(segments_BL, config.rotary, config.rope_base)
            return rotate(x_BHLP, cos_BLh[:, None], sin_BLh[:, None])
        cos_Lh, sin_Lh = rotation(start, x_BHLP.shape[2], config.rotary, config.rope_base, x_BHLP.device)
        return rotate(x_BHLP, cos_Lh, sin_Lh)

    def _output(self, y_BLHV: Tensor, x_BLD: Tensor) -> Tensor:
        """Return the block's output of the heads' results (B, L, H, V) and the block's input, or both without L."""
        if self.gate_proj is not None:
            gate = torch.sigmoid(self.gate_proj(x_BLD))
            y_BLHV = y_BLHV * torch.unflatten(gate, -1, (self.config.heads, -1))
        y_BLD: Tensor = self.out_proj(y_BLHV.flatten(-2))
        return y_BLD

    def one_token(self, norm: nn.Module, state: State) -> Callable[[Tensor], Tensor] | None:
        if type(self).forward is not Attention.forward or not is_plain_eager(state[0].device):
            return None
        if self.latent is not None and (
            has_hooks(self.latent) or not self.latent.reads_weight
        ):  # called in parts below
            return None
        normed = one_row(norm)
        if self.latent is not None:
            latents, sinks = LatentCache(self.latent, cast(LatentState, state)), self.sinks

            def read(x_BD: Tensor) -> Tensor:
                return latents(x_BD, sinks)
        else:
            read = _Cache(self, cast(AttentionState, state))

        def run(x_BD: Tensor) -> Tensor:
            n_BD = normed(x_BD)
            return x_BD + self._output(read(n_BD), n_BD)

        return run

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> State:
        if self.latent is not None:
            return self.latent.init_state(batch_size, device=device, dtype=dtype)
        shape = (batch_size, self.config.kv_heads, 0, self.config.head_width)
        return AttentionState(*(torch.empty(shape, device=device, dtype=dtype) for _ in range(2)))

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        linears = [self.out_proj, self.gate_proj]
        if self.latent is not None:
            self.latent.reset_parameters(init_scale)
        else:
            linears.insert(0, self.qkv_proj)  # drawn first, as before there were options
        for linear in linears:
            if linear is not None:
                truncated_normal_(linear.weight, linear.in_features, init_scale)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, (RMSNorm, ZeroCenteredRMSNorm)):
                norm.reset_parameters()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def implementations(self, device: torch.device) -> dict[str, str]:
        if self.impl is Impl.REFERENCE:
            return {"attention": "reference: all scores written out"}
        if self.config.softcap is not None or self.config.sink:
            return {"attention": "torch matmul and softmax"}
        return {"attention": "torch scaled_dot_product_attention"}


class _Cache:
    """The heads' results for one token after another, over a cache with spare positions: no token copies it.

    Under a window it is a ring: a token takes the place of the one that has just left the window.
    """

    def __init__(self, block: Attention, state: AttentionState) -> None:
        self._block, self._config = block, block.config
        self._norms = [None if norm is None else one_row(norm) for norm in (block.q_norm, block.k_norm)]
        self._k_BKTP, self._v_BKTP = state
        self._read = state.k_BKTP.shape[2]  # positions, counted from the oldest in the state
        if self._config.window is not None:  # overwritten, so every sequence needs memory of its own
            self._k_BKTP, self._v_BKTP = block._turned(state.k_BKTP, 0).contiguous(), state.v_BKTP.contiguous()
        self._angles = Angles(self._config.rotary, self._config.rope_base, state.k_BKTP.device)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """Return (B, H, P) after reading x (B, D), which the layer's norm has been applied to."""
        config, at, window = self._config, self._read, self._config.window
        q_BHP, k_BKP, v_BKP = self._block._project(x_BD, *self._norms)
        if config.positions == "rope":
            cos_h, sin_h = self._angles.at(at)
            q_BHP, k_BKP = rotate(q_BHP, cos_h, sin_h), rotate(k_BKP, cos_h, sin_h)
        size = self._k_BKTP.shape[2]
        if at >= size and (window is None or size < window):
            self._grow(next_capacity(at) if window is None else min(next_capacity(at), window))
        slot = at if window is None else at % window
        self._k_BKTP[:, :, slot], self._v_BKTP[:, :, slot] = k_BKP, v_BKP
        self._read = at + 1
        kept = at + 1 if window is None else min(at + 1, window)
        y_BHLP = softmax_attention(
            q_BHP[:, :, None],
            self._k_BKTP[:, :, :kept].to(q_BHP.dtype),
            self._v_BKTP[:, :, :kept].to(q_BHP.dtype),
            scale=config.scale,
            softcap=config.softcap,
            sink_H=self._block.sinks,
            impl=self._block.impl,
        )
        return y_BHLP[:, :, 0]

    def _grow(self, size: int) -> None:
        kept = self._read
        for name in ("_k_BKTP", "_v_BKTP"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], size, old.shape[3])
            new[:, :, :kept] = old
            setattr(self, name, new)
