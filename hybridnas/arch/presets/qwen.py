"""Qwen3-Next and Qwen3.5 (Alibaba, 2025 and 2026): Gated DeltaNet, every fourth layer gated attention; text models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, routing, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Qwen(Release):
    """Sizes of one model."""

    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    delta: tuple[int, int, int] = (32, 16, 128)  # of values, of keys, channels of one
    tied: bool = False
    d_ff: int = 0
    top_k: int = 0
    d_expert: int = 0  # of the shared expert, too
    vocab_size: int = 248320


RELEASES = (
    Qwen(
        name="qwen3_next",
        title="Qwen3-Next-80B-A3B",
        source="transformers Qwen3NextConfig; config.json of the checkpoint",
        total=79_674_391_296,
        counted="transformers Qwen3NextForCausalLM",
        params="80B",
        active_params="3B",
        d_model=2048,
        n_blocks=48,
        vocab_size=151936,
        n_experts=512,
        heads=(16, 2, 256),
        top_k=10,
        d_expert=512,
    ),
    Qwen(
        name="qwen3_5_4b",
        title="Qwen3.5-4B",
        source="config.json of the checkpoint",
        total=4_205_751_296,
        counted="transformers Qwen3_5ForCausalLM",
        params="4B",
        d_model=2560,
        n_blocks=32,
        heads=(16, 4, 256),
        tied=True,
        d_ff=9216,
    ),
    Qwen(
        name="qwen3_5_9b",
        title="Qwen3.5-9B",
        source="transformers Qwen3_5TextConfig",
        total=8_953_803_264,
        counted="transformers Qwen3_5ForCausalLM",
        params="9B",
        d_model=4096,
        n_blocks=32,
        heads=(16, 4, 256),
        d_ff=12288,
    ),
    Qwen(
        name="qwen3_5_35b_a3b",
        title="Qwen3.5-35B-A3B",
        source="transformers Qwen3_5MoeTextConfig",
        total=34_660_610_688,
        counted="transformers Qwen3_5MoeForCausalLM",
        params="35B",
        active_params="3B",
        d_model=2048,
        n_blocks=40,
        n_experts=256,
        heads=(16, 2, 256),
        top_k=8,
        d_expert=512,
    ),
)


@register_family(*RELEASES)
def qwen(release: Qwen, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Gated DeltaNet and, every fourth layer, gated attention that turns a quarter of a head; SwiGLU or experts."""
    ratio = d_model / release.d_model
    attention = every(4, 3, n_blocks)
    delta = attention_heads(*release.delta, ratio)
    feed = "E" if release.n_experts else "F"
    return layered(
        (("A" if i in attention else "G") + feed for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm="rmsnorm_zero",
        norm_eps=1e-6,
        final_norm=True,
        tie_embeddings=release.tied,
        G={
            "n_heads": delta["n_kv_heads"],
            "n_value_heads": delta["n_heads"],
            "head_dim": delta["head_dim"],
            "value_head_dim": delta["head_dim"],
            "norm_eps": 1e-6,
        },
        A={
            **attention_heads(*release.heads, ratio),
            "gate": "elementwise",
            "qk_norm": "head",
            "qk_norm_zero_centered": True,
            "rotary_fraction": 0.25,
            "rope_base": 1e7,
        },
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            "router": "top_k",
            "renormalize": True,
            "load_balance_weight": 0.001,
            "d_shared": width(release.d_expert, ratio),
            "shared_gate": True,
        },
    )
