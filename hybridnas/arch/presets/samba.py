"""Samba (arXiv 2406.07522): Mamba, MLP, attention in a sliding window, MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Samba(Release):
    """Sizes of one model."""

    heads: int  # of 128 channels
    d_ff: int
    source: str = "microsoft/Samba, lit_gpt/config.py"
    counted: str = "formula of lit_gpt/model.py"
    vocab_size: int = 32000


RELEASES = (
    Samba(
        name="samba_421m",
        title="Samba-421M",
        total=421_793_280,
        params="421M",
        d_model=1536,
        n_blocks=12,
        heads=12,
        d_ff=4096,
    ),
    Samba(
        name="samba_1_3b",
        title="Samba-1.3B",
        total=1_330_207_488,
        params="1.3B",
        d_model=2304,
        n_blocks=18,
        heads=18,
        d_ff=6144,
    ),
)


@register_family(*RELEASES)
def samba(release: Samba, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Mamba and windowed attention in turn, an MLP after each."""
    ratio = d_model / release.d_model
    attention = every(2, 1, n_blocks)
    return layered(
        ("AF" if i in attention else "MF" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        tie_embeddings=True,
        A={**attention_heads(release.heads, release.heads, 128, ratio), "window": 2048},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        **RMSNORM,
    )
