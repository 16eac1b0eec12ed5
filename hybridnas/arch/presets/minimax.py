"""MiniMax-Text-01 (arXiv 2501.08313): lightning attention, every eighth layer softmax attention, and experts.

The residual stream goes on normed and scaled by the fourth root of 2 * layers (DeepNorm's factor); the decays of
lightning attention become slower with depth, so that every layer has its own ``decay_factor``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, recurrent_heads, routing

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class MiniMax(Release):
    """Sizes of one model."""

    heads: tuple[int, int, int]  # of queries, of keys, channels of one; lightning attention has those of the queries
    top_k: int
    d_expert: int


RELEASES = (
    MiniMax(
        name="minimax_text_01",
        title="MiniMax-Text-01",
        source="arXiv 2501.08313; MiniMax-AI/MiniMax-01",
        total=456_089_655_296,
        counted="transformers MiniMaxForCausalLM",
        params="456B",
        active_params="45.9B",
        d_model=6144,
        n_blocks=80,
        vocab_size=200064,
        n_experts=32,
        heads=(64, 8, 128),
        top_k=2,
        d_expert=9216,
    ),
)


@register_family(*RELEASES)
def minimax(release: MiniMax, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Lightning attention and, every eighth layer, attention that turns half of a head; SwiGLU experts."""
    ratio = d_model / release.d_model
    heads, _, channels = release.heads
    attention = every(8, 7, n_blocks)
    lightning_heads, lightning_channels, _ = recurrent_heads(heads, channels, ratio)

    def mixer(layer: int) -> str:
        factor = 1 - layer / (n_blocks - 1 + 1e-5) + 1e-5
        return "A" if layer in attention else f"L{{decay_factor={factor:.9g}}}"

    return layered(
        (mixer(i) + "E" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm_position="stream",
        stream_multiplier=(2 * n_blocks) ** 0.25,
        L={
            "kind": "lightning",
            "n_heads": lightning_heads,
            "head_dim": lightning_channels,
            "value_head_dim": lightning_channels,
            "norm_eps": 1e-6,
        },
        A={**attention_heads(*release.heads, ratio), "rotary_fraction": 0.5, "rope_base": 1e7},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            "router": "top_k",
            "renormalize": True,
            "load_balance_weight": 0.001,
        },
        **RMSNORM,
    )
