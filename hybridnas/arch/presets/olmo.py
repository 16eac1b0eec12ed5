"""OLMo-Hybrid (Ai2, arXiv 2604.03444): Gated DeltaNet with eigenvalues down to -1, every fourth layer attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, recurrent_heads, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Olmo(Release):
    """Sizes of one model."""

    heads: tuple[int, int]  # of attention: number, channels of one
    delta: tuple[int, int]  # of Gated DeltaNet: number, key channels of one; values have twice as many
    d_ff: int


RELEASES = (
    Olmo(
        name="olmo_hybrid",
        title="OLMo-Hybrid-7B",
        source="arXiv 2604.03444; transformers OlmoHybridConfig",
        total=7_430_870_688,
        counted="transformers OlmoHybridForCausalLM",
        params="7B",
        d_model=3840,
        n_blocks=32,
        vocab_size=100352,
        heads=(30, 128),
        delta=(30, 96),
        d_ff=11008,
    ),
)


@register_family(*RELEASES)
def olmo(release: Olmo, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Gated DeltaNet and SwiGLU with norms before; every fourth layer attention without positions, norms after."""
    ratio = d_model / release.d_model
    heads, channels = release.heads
    delta_heads, key_channels, _ = recurrent_heads(*release.delta, ratio)
    attention = every(4, 3, n_blocks)
    return layered(
        ("AF{norm_position=post}" if i in attention else "GF" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm_eps=1e-6,
        G={
            "n_heads": delta_heads,
            "head_dim": key_channels,
            "value_head_dim": 2 * key_channels,
            "negative_eigenvalues": True,
        },
        A={
            **attention_heads(heads, heads, channels, ratio),
            "positions": "none",
            "qk_norm": "all",
            "norm_position": "post",
        },
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        **RMSNORM,
    )
