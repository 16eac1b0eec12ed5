"""LFM2 (Liquid AI, arXiv 2511.23404): gated short convolutions and some attention, an MLP or experts after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SIGMOID, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, routing, spread, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Lfm2(Release):
    """Sizes of one model. ``d_ff`` is the width that is built: two thirds of config.json's, rounded up to 256."""

    attention: tuple[int, ...] = (2, 5, 8, 10, 12, 14)  # layers, from 0
    heads: tuple[int, int, int] = (32, 8, 64)  # of queries, of keys, channels of one
    d_ff: int
    dense: int = 0  # first layers, which have an MLP where others have experts
    top_k: int = 0
    d_expert: int = 0
    source: str = "arXiv 2511.23404; config.json of the checkpoint"
    counted: str = "transformers Lfm2ForCausalLM"
    n_blocks: int = 16
    vocab_size: int = 65536


RELEASES = (
    Lfm2(
        name="lfm2_350m",
        title="LFM2-350M",
        total=354_483_968,
        params="350M",
        d_model=1024,
        heads=(16, 8, 64),
        d_ff=4608,
    ),
    Lfm2(
        name="lfm2_700m",
        title="LFM2-700M",
        total=742_489_344,
        params="700M",
        d_model=1536,
        heads=(24, 8, 64),
        d_ff=6912,
    ),
    Lfm2(name="lfm2_1_2b", title="LFM2-1.2B", total=1_170_340_608, params="1.2B", d_model=2048, d_ff=8192),
    Lfm2(
        name="lfm2_2_6b",
        title="LFM2-2.6B",
        total=2_569_272_320,
        params="2.6B",
        d_model=2048,
        n_blocks=30,
        attention=(2, 5, 9, 13, 17, 21, 24, 27),
        d_ff=10752,
    ),
    Lfm2(
        name="lfm2_8b_a1b",
        title="LFM2-8B-A1B",
        total=8_339_929_856,
        counted="transformers Lfm2MoeForCausalLM",
        params="8.3B",
        active_params="1.5B",
        d_model=2048,
        n_blocks=24,
        n_experts=32,
        attention=(2, 6, 10, 14, 18, 21),
        d_ff=7168,
        dense=2,
        top_k=4,
        d_expert=1792,
    ),
)


@register_family(*RELEASES)
def lfm2(release: Lfm2, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """A convolution of three taps between gates, or attention with normed queries and keys; SwiGLU or experts."""
    ratio = d_model / release.d_model
    attention = spread(release.attention, release.n_blocks, n_blocks)
    dense = max(1, round(release.dense * n_blocks / release.n_blocks)) if release.n_experts else n_blocks
    return layered(
        (("A" if i in attention else "C") + ("F" if i < dense else "E") for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        tie_embeddings=True,
        A={**attention_heads(*release.heads, ratio), "qk_norm": "head", "norm_eps": 1e-5, "rope_base": 1e6},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            **SIGMOID,
            "renormalize_eps": 1e-6,
        },
        **RMSNORM,
    )
