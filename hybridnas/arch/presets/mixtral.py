"""Mixtral (arXiv 2401.04088): a Transformer whose feed-forward layers are experts, two of eight for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SWIGLU, Release, register_family, repeated
from hybridnas.arch.scaling import attention_heads, routing

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Mixtral(Release):
    """Sizes of one model."""

    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    top_k: int
    d_expert: int


RELEASES = (
    Mixtral(
        name="mixtral",
        title="Mixtral-8x7B",
        source="arXiv 2401.04088, Table 1; transformers MixtralConfig",
        total=46_702_792_704,
        counted="transformers MixtralForCausalLM",
        params="46.7B",
        active_params="12.9B",
        d_model=4096,
        n_blocks=32,
        vocab_size=32000,
        n_experts=8,
        heads=(32, 8, 128),
        top_k=2,
        d_expert=14336,
    ),
)


@register_family(*RELEASES)
def mixtral(release: Mixtral, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Grouped-query attention and routed SwiGLU experts in turn."""
    ratio = d_model / release.d_model
    experts = routing(release.top_k, release.d_expert, n_experts, ratio)
    return repeated(
        "AE",
        n_blocks,
        d_model=d_model,
        vocab_size=vocab_size,
        A={**attention_heads(*release.heads, ratio), "rope_base": 1e6},
        E={**experts, **SWIGLU, **DROPLESS, "router": "top_k", "renormalize": True, "load_balance_weight": 0.02},
        **RMSNORM,
    )
