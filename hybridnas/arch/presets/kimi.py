"""Kimi Linear (Moonshot AI, arXiv 2510.26692): Kimi delta attention, in every fourth layer latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SIGMOID, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import every, recurrent_heads, routing, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Kimi(Release):
    """Sizes of one model."""

    heads: tuple[int, int]  # of both mixers: number, channels of one
    kv_rank: int
    rope_dim: int  # channels of a latent head beside; nothing turns
    d_ff: int  # of the first layer
    top_k: int
    d_expert: int  # of the shared expert, too


RELEASES = (
    Kimi(
        name="kimi_linear",
        title="Kimi-Linear-48B-A3B",
        source="arXiv 2510.26692; MoonshotAI/Kimi-Linear; config.json of the checkpoint",
        total=49_122_675_072,
        counted="transformers KimiLinearForCausalLM",
        params="48B",
        active_params="3B",
        d_model=2304,
        n_blocks=27,
        vocab_size=163840,
        n_experts=256,
        heads=(32, 128),
        kv_rank=512,
        rope_dim=64,
        d_ff=9216,
        top_k=8,
        d_expert=1024,
    ),
)


@register_family(*RELEASES)
def kimi(release: Kimi, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Kimi delta attention and, every fourth layer and last, latent attention without positions; experts but first."""
    ratio = d_model / release.d_model
    heads, channels, _ = recurrent_heads(*release.heads, ratio)
    attention = {*every(4, 3, n_blocks), n_blocks - 1}
    return layered(
        (("A" if i in attention else "K") + ("E" if i else "F") for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        K={"n_heads": heads, "head_dim": channels, "decay_rank": channels, "gate_rank": channels},
        A={
            "n_heads": heads,
            "head_dim": channels,
            "kv_rank": width(release.kv_rank, ratio),
            "rope_dim": release.rope_dim * channels // release.heads[1],
            "positions": "none",
        },
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            **SIGMOID,
            "routed_scale": 2.446,
            "d_shared": width(release.d_expert, ratio),
        },
        **RMSNORM,
    )
