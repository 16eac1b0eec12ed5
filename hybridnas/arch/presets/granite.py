"""Granite 4.0 H (IBM, 2025): Mamba-2 with few layers of attention, each layer ending in an MLP or in experts.

Its multipliers follow the sizes by rules that hold for all releases: of the embedding 12, of the residual branches
0.22 at 40 layers and over the root of the depth, of the scores 1 / head_dim, of the logits 256 / d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, recurrent_heads, routing, spread, state_size, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Granite(Release):
    """Sizes of one model."""

    attention: tuple[int, ...] = (5, 15, 25, 35)  # layers, from 0
    mamba: tuple[int, int]  # heads, channels of one
    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int = 0
    top_k: int = 0
    d_expert: int = 0
    d_shared: int = 0
    source: str = "ibm-granite/granite-4.0-language-models; config.json of the checkpoint"
    counted: str = "transformers GraniteMoeHybridForCausalLM"
    n_blocks: int = 40
    vocab_size: int = 100352


RELEASES = (
    Granite(
        name="granite_h_350m",
        title="Granite-4.0-H-350M",
        total=340_332_224,
        params="340M",
        d_model=768,
        n_blocks=32,
        attention=(10, 13, 17, 27),
        mamba=(48, 32),
        heads=(12, 4, 64),
        d_ff=2048,
    ),
    Granite(
        name="granite_h_1b",
        title="Granite-4.0-H-1B",
        total=1_461_538_368,
        params="1.5B",
        d_model=1536,
        mamba=(48, 64),
        heads=(12, 4, 128),
        d_ff=4096,
    ),
    Granite(
        name="granite_h_micro",
        title="Granite-4.0-H-Micro",
        total=3_191_396_096,
        params="3B",
        d_model=2048,
        mamba=(64, 64),
        heads=(32, 8, 64),
        d_ff=8192,
    ),
    Granite(
        name="granite_h_tiny",
        title="Granite-4.0-H-Tiny",
        total=6_939_037_248,
        params="7B",
        active_params="1B",
        d_model=1536,
        mamba=(48, 64),
        heads=(12, 4, 128),
        n_experts=64,
        top_k=6,
        d_expert=512,
        d_shared=1024,
    ),
    Granite(
        name="granite_h_small",
        title="Granite-4.0-H-Small",
        total=32_207_337_984,
        params="32B",
        active_params="9B",
        d_model=4096,
        mamba=(128, 64),
        heads=(32, 8, 128),
        n_experts=72,
        top_k=10,
        d_expert=768,
        d_shared=1536,
    ),
)


@register_family(*RELEASES)
def granite(release: Granite, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Mamba-2 or, in a tenth of the layers, attention without positions, and SwiGLU or experts with a shared one."""
    ratio = d_model / release.d_model
    heads, channels, _ = recurrent_heads(*release.mamba, ratio)
    attention = spread(release.attention, release.n_blocks, n_blocks)
    shape = attention_heads(*release.heads, ratio)
    feed = "E" if release.n_experts else "F"
    return layered(
        (("A" if i in attention else "N") + feed for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        tie_embeddings=True,
        embedding_multiplier=12.0,
        out_multiplier=round(0.22 * (40 / n_blocks) ** 0.5, 3),
        logits_multiplier=256 / d_model,
        N={"d_inner": heads * channels, "head_dim": channels, "d_state": state_size(128, d_model)},
        A={**shape, "positions": "none", "scale": 1 / shape["head_dim"]},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            "router": "top_k",
            "renormalize": True,
            "d_shared": width(release.d_shared, ratio),
        },
        **RMSNORM,
    )
