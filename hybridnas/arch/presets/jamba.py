"""Jamba (arXiv 2403.19887, 2408.12570): Mamba with one layer of attention in eight, experts in every second layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, routing, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Jamba(Release):
    """Sizes of one model."""

    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int  # of the MLPs and of each of the experts
    top_k: int


RELEASES = (
    Jamba(
        name="jamba",
        title="Jamba v0.1 and 1.5-Mini",
        source="arXiv 2403.19887; config.json of the checkpoint",
        total=51_570_323_328,
        counted="transformers JambaForCausalLM",
        params="52B",
        active_params="12B",
        d_model=4096,
        n_blocks=32,
        vocab_size=65536,
        n_experts=16,
        heads=(32, 8, 128),
        d_ff=14336,
        top_k=2,
    ),
)


@register_family(*RELEASES)
def jamba(release: Jamba, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Mamba or, every eighth layer, attention without positions; SwiGLU and experts of the same width in turn."""
    ratio = d_model / release.d_model
    attention = every(8, 4, n_blocks)
    return layered(
        (("A" if i in attention else "M") + "FE"[i % 2] for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm_eps=1e-6,
        M={"selective_norm": "scaled", "selective_norm_eps": 1e-6},
        A={**attention_heads(*release.heads, ratio), "positions": "none"},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(release.top_k, release.d_ff, n_experts, ratio),
            **SWIGLU,
            **DROPLESS,
            "router": "top_k",
            "load_balance_weight": 0.001,
        },
        **RMSNORM,
    )
