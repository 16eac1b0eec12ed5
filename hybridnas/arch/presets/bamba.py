"""Bamba (IBM, Princeton, CMU and UIUC, 2024): Mamba-2 with three layers of attention, an MLP after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, recurrent_heads, spread, state_size, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Bamba(Release):
    """Sizes of one model."""

    attention: tuple[int, ...]  # layers, from 0
    mamba: tuple[int, int]  # heads, channels of one
    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int


RELEASES = (
    Bamba(
        name="bamba",
        title="Bamba-9B",
        source="foundation-model-stack/bamba; config.json of the checkpoint",
        total=9_780_235_392,
        counted="transformers BambaForCausalLM",
        params="9.78B",
        d_model=4096,
        n_blocks=32,
        vocab_size=128256,
        attention=(9, 18, 27),
        mamba=(128, 64),
        heads=(32, 8, 128),
        d_ff=14336,
    ),
)


@register_family(*RELEASES)
def bamba(release: Bamba, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Mamba-2 or, in a tenth of the layers, attention with rotary positions on half of each head, and SwiGLU."""
    ratio = d_model / release.d_model
    heads, channels, _ = recurrent_heads(*release.mamba, ratio)
    attention = spread(release.attention, release.n_blocks, n_blocks)
    return layered(
        ("AF" if i in attention else "NF" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        N={"d_inner": heads * channels, "head_dim": channels, "d_state": state_size(128, d_model)},
        A={**attention_heads(*release.heads, ratio), "rotary_fraction": 0.5},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        **RMSNORM,
    )
