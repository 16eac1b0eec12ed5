"""Linear attention, letter L: the recurrences that ``kind`` names, on one kernel.

    kind       S_t =                                     q, k                 output            published as
    plain      S + k v^T                                 elu + 1              / (q sum k)       2006.16236
    retnet     gamma_h S + k v^T, gamma = 1 - 2^(-5-h)   rotary               rmsnorm, silu     2307.08621
    lightning  exp(-s_h) S + k v^T, s_h = f 2^(-8(h+1)/H)   silu (v too)      rmsnorm, sigmoid  2501.08313
    gla        diag(sigmoid(W x + b)^(1/16)) S + k v^T   as projected         rmsnorm, silu     2312.06635
    deltanet   S + k (beta (v - S^T k))^T                conv, silu, l2       rmsnorm           2406.06484
    hgrn2      diag(f) S + k v^T, k = 1 - f              silu (q)             rmsnorm           2404.07904

and o_t = S_t^T q_t. Shapes: B batch, L length, D d_model, H heads, K key channels and V value channels of a head,
C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    largest_divisor,
)
from hybridnas.layers.rotary import rotate, rotation
from hybridnas.layers.segments import rotation_by_document
from hybridnas.layers.width import WidthRule, matrix
from hybridnas.registry import register_block

_HEAD = 64  # value channels of a head by default
_SUM_EPS = 1e-6  # added to plain's sum of weights, as in the authors' fast_transformers


class _Kind(NamedTuple):
    """What a published block does where the options say auto, and which options are its own."""

    feature_map: str = "none"
    silu: bool = False  # SiLU on q, k and v where there is no convolution
    taps: int = 0
    norm: str = "head"
    gate: str = "none"
    scaled: bool = True  # whether queries are divided by sqrt(K)
    own: tuple[str, ...] = ()


_KINDS = {
    "plain": _Kind(feature_map="elu", norm="sum", scaled=False),
    "retnet": _Kind(gate="silu", own=("rope_base", "decay_factor")),
    "lightning": _Kind(silu=True, norm="whole", gate="sigmoid", scaled=False, own=("decay_factor",)),
    "gla": _Kind(gate="silu", own=("decay_rank", "decay_temperature")),
    "deltanet": _Kind(feature_map="l2", silu=True, taps=4, own=("negative_eigenvalues",)),
    "hgrn2": _Kind(norm="whole", scaled=False, own=("lower_bound",)),
}
_OWN = tuple(dict.fromkeys(name for kind in _KINDS.values() for name in kind.own))
_POSITIVE = ("elu", "relu")


@register_block("L", name="linear_attention")
class LinearAttention(LinearRecurrence):
    """Linear attention: plain, RetNet, lightning attention, GLA, DeltaNet or HGRN-2, by ``kind``.

    Each kind is the published recurrence; feature map, output norm, output gate and short convolution are its own
    where they are auto, and can be exchanged. HGRN-2's keys are 1 - f, and its convolution passes q and v alone.
    RetNet's positions are kept in the state: it is turned so that every call counts its steps from 0.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RecurrenceConfig):
        """Fields of the linear attention block."""

        kind: str = option("plain", "which published recurrence", choices=tuple(_KINDS))
        n_heads: int | None = option(None, "heads; none: of 64 channels where that divides d_model [count]", ge=1)
        head_dim: int | None = option(
            None, "key channels of a head; none: value_head_dim, half of it with an output gate [channels]", ge=1
        )
        value_head_dim: int | None = option(
            None, "value channels of a head; none: d_model / n_heads [channels]", ge=1, sizable=True
        )
        feature_map: str = option(
            "auto", "of queries and keys; auto: by kind", choices=("auto", "none", "elu", "relu", "l2")
        )
        norm: str = option(
            "auto",
            "of the output: RMSNorm of each head or of the whole, or division by the keys' weights; auto: by kind",
            choices=("auto", "head", "whole", "sum", "none"),
        )
        gate: str = option(
            "auto", "activation of the output gate; auto: by kind", choices=("auto", "silu", "sigmoid", "none")
        )
        d_conv: int | None = option(
            None, "taps of a causal convolution with SiLU; 0: none; none: by kind [tokens]", ge=0
        )
        conv_bias: bool = option(False, "bias of the convolution")
        rope_base: float = option(10000.0, "base of the rotary wavelengths, for retnet", gt=0)
        decay_factor: float = option(
            1.0, "factor on the fixed decays' logarithms, such as 1 - layer / (layers - 1) + 1e-5 in lightning", gt=0
        )
        decay_rank: int = option(16, "inner width of gla's two decay matrices [channels]", ge=1)
        decay_temperature: float = option(16.0, "divisor of the logarithms of gla's decays", gt=0)
        lower_bound: float = option(0.0, "least forget gate of hgrn2, which rises with depth in the paper", ge=0)
        negative_eigenvalues: bool = option(False, "beta in [0, 2] in place of [0, 1], for deltanet")
        norm_eps: float = option(1e-5, "epsilon of the output norm", gt=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            self._check_kind()
            if self.value_head_dim is None and self.d_model % self.heads:
                near = largest_divisor(self.d_model, self.heads)
                raise ConfigError(
                    f"{self.label()} n_heads={self.heads} does not divide d_model={self.d_model}; use n_heads={near}, "
                    f"or give value_head_dim",
                    field="n_heads",
                    got=self.heads,
                    allowed=f"a divisor of {self.d_model}, such as {near}",
                )
            if self.kind == "retnet" and self.key_dim % 2:
                raise ConfigError(
                    f"{self.label()} kind='retnet' turns pairs of channels and needs an even head_dim, got "
                    f"{self.key_dim}",
                    field="head_dim",
                    got=self.key_dim,
                    allowed="an even number",
                )
            if self.lower_bound >= 1:
                raise ConfigError(
                    f"{self.label()} lower_bound={self.lower_bound} must be < 1, where nothing is forgotten",
                    field="lower_bound",
                    got=self.lower_bound,
                    allowed="< 1",
                )

        def _check_kind(self) -> None:
            """Raise ConfigError for options that belong to another kind, and for combinations without a meaning."""
            for name in _OWN:
                value, default = getattr(self, name), self.field(name).default
                if value != default and name not in _KINDS[self.kind].own:
                    kinds = [kind for kind, published in _KINDS.items() if name in published.own]
                    raise ConfigError(
                        f"{self.label()} {name}={value!r} has no meaning for kind={self.kind!r}; use "
                        f"{name}={default!r}, or kind={' or '.join(kinds)}",
                        field=name,
                        got=value,
                        allowed=(default,),
                    )
            if self.resolved("norm") == "sum" and self.kind != "plain":
                raise ConfigError(
                    f"{self.label()} norm='sum' divides by a sum of undecayed weights, which kind={self.kind!r} does "
                    f"not have; use norm='head', or kind='plain'",
                    field="norm",
                    got="sum",
                    allowed=("auto", "head", "whole", "none"),
                )
            if self.resolved("norm") == "sum" and self.resolved("feature_map") not in _POSITIVE:
                raise ConfigError(
                    f"{self.label()} norm='sum' needs positive weights, got feature_map="
                    f"{self.resolved('feature_map')!r}; use feature_map='elu', or norm='head'",
                    field="feature_map",
                    got=self.resolved("feature_map"),
                    allowed=_POSITIVE,
                )
            if self.kind == "hgrn2" and self.resolved("feature_map") != "none":
                raise ConfigError(
                    f"{self.label()} feature_map={self.feature_map!r} has no meaning for kind='hgrn2', whose keys are "
                    f"1 - f; use feature_map='none'",
                    field="feature_map",
                    got=self.feature_map,
                    allowed=("auto", "none"),
                )
            if self.conv_bias and not self.taps:
                raise ConfigError(
                    f"{self.label()} conv_bias=True needs a convolution, got d_conv=0 for kind={self.kind!r}; use "
                    f"d_conv=4 or conv_bias=False",
                    field="conv_bias",
                    got=True,
                    allowed=(False,),
                )

        def resolved(self, name: str) -> str:
            """Return feature_map, norm or gate with auto resolved."""
            value: str = getattr(self, name)
            if value == "auto":
                value = getattr(_KINDS[self.kind], name)
            return value

        @property
        def taps(self) -> int:
            """Return d_conv with its default resolved."""
            return self.d_conv if self.d_conv is not None else _KINDS[self.kind].taps

        @property
        def heads(self) -> int:
            """Return n_heads with its default resolved."""
            if self.n_heads is not None:
                return self.n_heads
            if self.value_head_dim is not None:
                return max(1, self.d_model // self.value_head_dim)
            return largest_divisor(self.d_model, max(1, self.d_model // _HEAD))

        @property
        def value_dim(self) -> int:
            """Return value_head_dim with its default resolved."""
            return self.value_head_dim if self.value_head_dim is not None else self.d_model // self.heads

        @property
        def key_dim(self) -> int:
            """Return head_dim with its default resolved: even for retnet."""
            if self.head_dim is not None:
                return self.head_dim
            width = self.value_dim if self.resolved("gate") == "none" else (self.value_dim + 1) // 2
            return width + width % 2 if self.kind == "retnet" else width

        @property
        def shape(self) -> RecurrenceShape:
            keys, values = self.heads * self.key_dim, self.heads * self.value_dim
            return RecurrenceShape(
                d_model=self.d_model,
                key_heads=self.heads,
                value_heads=self.heads,
                key_dim=self.key_dim,
                value_dim=self.value_dim,
                mixed=(1 if self.kind == "hgrn2" else 2) * keys + values,
                decay_in={"gla": self.decay_rank, "hgrn2": keys}.get(self.kind, 0),
                has_decay=self.kind not in ("plain", "deltanet"),
                delta=self.kind == "deltanet",
                taps=self.taps,
                conv_bias=self.conv_bias,
                silu=_KINDS[self.kind].silu,
                gate=self.resolved("gate"),
                norm=self.resolved("norm"),
                norm_eps=self.norm_eps,
            )

        def cost(self, seq_len: int, dtype_bytes: int = 4) -> Cost:
            if self.kind != "gla":
                return self.shape.cost(dtype_bytes)
            keys = self.heads * self.key_dim
            return self.shape.cost(dtype_bytes, matrices=self.decay_rank * keys, vectors=keys)

        def canonical(self) -> dict[str, Any]:
            fields = {**self.to_dict(), "n_heads": self.heads, "head_dim": self.key_dim, "d_conv": self.taps}
            fields |= {"value_head_dim": self.value_dim}
            fields |= {name: self.resolved(name) for name in ("feature_map", "norm", "gate")}
            idle = set(_OWN) - set(_KINDS[self.kind].own)
            return {name: value for name, value in fields.items() if name not in idle}

    def __init__(self, config: Config, *, impl: Impl = Impl.AUTO) -> None:
        super().__init__(config, impl=impl)
        self.decay_proj = nn.Linear(config.decay_rank, config.heads * config.key_dim) if config.kind == "gla" else None
        self.reset_parameters()

    @classmethod
    def test_configs(cls) -> Sequence[Variant]:
        return [
            Variant(),
            Variant(fields={"n_heads": 2, "feature_map": "relu", "d_conv": 3, "head_dim": 5, "conv_bias": True}),
            Variant(fields={"feature_map": "l2", "norm": "head", "gate": "sigmoid"}),
            Variant(fields={"kind": "retnet", "n_heads": 2, "rope_base": 100.0}),
            Variant(fields={"kind": "lightning", "n_heads": 2, "decay_factor": 0.5, "norm": "none"}),
            Variant(fields={"kind": "gla", "n_heads": 4, "decay_rank": 3}),
            Variant(fields={"kind": "deltanet", "n_heads": 2, "negative_eigenvalues": True}),
            Variant(fields={"kind": "hgrn2", "lower_bound": 0.3}),
            Variant(fields={"kind": "hgrn2", "n_heads": 2, "d_conv": 4, "gate": "silu"}),
        ]

    def recur(
        self,
        u_BLC: Tensor,
        decay_BLX: Tensor,
        beta_BLH: Tensor | None,
        memory_BHKV: Tensor | None,
        segments_BL: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        config: LinearAttention.Config = self.config
        kind = _KINDS[config.kind]
        scale = None if kind.scaled else 1.0
        wide = torch.promote_types(u_BLC.dtype, torch.float32)
        log: Tensor | None = None
        if config.kind == "hgrn2":
            q_BLHK, k_BLHK, v_BLHV, log = self._hgrn2(u_BLC, decay_BLX.to(wide))
        else:
            q_BLHK, k_BLHK, v_BLHV = self.heads_of(u_BLC)
            q_BLHK, k_BLHK = (self._mapped(part) for part in (q_BLHK, k_BLHK))
        if self.decay_proj is not None:
            raw_BLHK = self.decay_proj(decay_BLX).unflatten(-1, (config.heads, config.key_dim))
            log = F.logsigmoid(raw_BLHK.to(wide)) / config.decay_temperature
        elif config.kind in ("retnet", "lightning"):
            log = _fixed_decays(config.kind, config.heads, u_BLC.device, wide) * config.decay_factor
        if beta_BLH is not None and config.negative_eigenvalues:
            beta_BLH = 2 * beta_BLH
        if self.shape.norm == "sum":
            v_BLHV = F.pad(v_BLHV, (0, 1), value=1.0)  # a value that is always 1 sums the weights
        if config.kind == "retnet":
            if segments_BL is None:
                angles = self._rotation(0, u_BLC.shape[1], u_BLC.device, wide)
            else:
                angles = rotation_by_document(segments_BL, config.key_dim, config.rope_base, wide)
            cos_L1K, sin_L1K = (part.unsqueeze(-2) for part in angles)
            q_BLHK, k_BLHK = rotate(q_BLHK, cos_L1K, sin_L1K), rotate(k_BLHK, cos_L1K, sin_L1K)
        o_BLHV, memory_BHKV = self.run(q_BLHK, k_BLHK, v_BLHV, log, beta_BLH, memory_BHKV, segments_BL, scale=scale)
        if config.kind == "retnet" and memory_BHKV is not None:
            # the next call counts its steps from 0 again
            back = self._rotation(-u_BLC.shape[1], 1, u_BLC.device, wide)
            memory_BHKV = rotate(memory_BHKV.mT, *back).mT
        if self.shape.norm == "sum":
            o_BLHV = o_BLHV[..., :-1] / (o_BLHV[..., -1:] + _SUM_EPS)
        return o_BLHV, memory_BHKV

    def _mapped(self, x_BLHK: Tensor) -> Tensor:
        kind = self.config.resolved("feature_map")
        if kind == "elu":
            positive_BLHK: Tensor = F.elu(x_BLHK) + 1
            return positive_BLHK
        if kind == "relu":
            return F.relu(x_BLHK)
        return self.unit(x_BLHK) if kind == "l2" else x_BLHK

    def _hgrn2(self, u_BLC: Tensor, raw_BLX: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k = 1 - f, v and log f for a forget gate f = bound + (1 - bound) sigmoid(raw)."""
        config: LinearAttention.Config = self.config
        heads, bound = (config.heads, config.key_dim), config.lower_bound
        q_BLX, v_BLX = torch.split(u_BLC, [config.heads * config.key_dim, self.shape.inner], dim=-1)
        if not config.taps:
            q_BLX = F.silu(q_BLX)
        raw_BLHK = torch.unflatten(raw_BLX, -1, heads)
        k_BLHK = ((1 - bound) * (-raw_BLHK).sigmoid()).to(u_BLC.dtype)
        log_BLHK = F.logsigmoid(raw_BLHK) if bound == 0 else (bound + (1 - bound) * raw_BLHK.sigmoid()).log()
        v_BLHV = torch.unflatten(v_BLX, -1, (config.heads, config.value_dim))
        return torch.unflatten(q_BLX, -1, heads), k_BLHK, v_BLHV, log_BLHK

    def _rotation(self, start: int, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return rotation(start, length, self.config.key_dim, self.config.rope_base, device, dtype)

    def step(self) -> tuple[Weights, Form]:
        config: LinearAttention.Config = self.config
        device, kind = self.in_proj.weight.device, config.kind
        decay, by = {
            "gla": ("sigmoid", config.decay_temperature),
            "hgrn2": ("forget", config.lower_bound),
            "retnet": ("fixed", 0.0),
            "lightning": ("fixed", 0.0),
        }.get(kind, ("none", 0.0))
        own: dict[str, Any] = {} if _KINDS[kind].scaled else {"scale": 1.0}
        if kind == "hgrn2":
            own["silu"] = config.heads * config.key_dim
        form = self.shape.form(
            decay=decay,
            decay_by=by,
            beta=0.0 if kind != "deltanet" else 2.0 if config.negative_eigenvalues else 1.0,
            feature_map=config.resolved("feature_map"),
            sum_eps=_SUM_EPS,
            **own,
        )
        fixed = _fixed_decays(kind, config.heads, device, torch.float32) * config.decay_factor
        half = config.key_dim // 2
        turns = config.rope_base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        second = self.decay_proj
        weights = self.weights(
            decay_proj=None if second is None else second.weight,
            decay_bias=None if second is None else second.bias,
            A_log=fixed if decay == "fixed" else None,
            frequency=turns if kind == "retnet" else None,
        )
        return weights, form

    def width_rules(self, base_width: int) -> dict[str, WidthRule]:
        """Return that of the decay's second matrix, whose fan-in is the same at every width."""
        return {} if self.decay_proj is None else {"decay_proj.weight": matrix(1.0)}

    def reset_parameters(self, init_scale: float = 0.1) -> None:
        super().reset_parameters(init_scale)
        if self.decay_proj is not None:
            self.decay_proj.reset_parameters()


def _fixed_decays(kind: str, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the logarithm of each head's decay (H,), before ``decay_factor``."""
    head_H = torch.arange(heads, device=device, dtype=dtype)
    if kind == "retnet":
        return torch.log1p(-torch.exp2(-5 - head_H))
    return -torch.exp2(-8 * (head_H + 1) / heads)
