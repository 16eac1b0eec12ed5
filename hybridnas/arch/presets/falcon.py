"""Falcon-H1 (TII, arXiv 2507.22448): Mamba-2 and attention side by side in every layer, then an MLP.

Its muP multipliers follow the released widths by one rule, which gives the published numbers of the 0.5B and the 7B
model. At another width those of the branches stay, since the initialization follows the width here, and that of the
logits follows it. Multipliers of rows of one matrix (keys, the MLP's gate, the parts of Mamba-2's input projection) are
part of that matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, register_family, repeated
from hybridnas.arch.scaling import attention_heads, recurrent_heads, state_size, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Falcon(Release):
    """Sizes of one model."""

    mamba: tuple[int, int, int]  # heads, channels of one, state
    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int
    source: str = "NVIDIA-NeMo/Megatron-Bridge, test_falcon_h1_bridge.py; transformers docs, falcon_h1"
    counted: str = "transformers FalconH1ForCausalLM"


RELEASES = (
    Falcon(
        name="falcon_h1_0_5b",
        title="Falcon-H1-0.5B",
        total=521_411_104,
        params="0.5B",
        d_model=1024,
        n_blocks=36,
        vocab_size=32784,
        mamba=(24, 64, 128),
        heads=(8, 2, 64),
        d_ff=2048,
    ),
    Falcon(
        name="falcon_h1_3b",
        title="Falcon-H1-3B",
        total=3_149_256_192,
        params="3B",
        d_model=2560,
        n_blocks=32,
        vocab_size=65536,
        mamba=(32, 128, 256),
        heads=(10, 2, 128),
        d_ff=6144,
    ),
    Falcon(
        name="falcon_h1_7b",
        title="Falcon-H1-7B",
        total=7_585_513_568,
        params="7B",
        d_model=3072,
        n_blocks=44,
        vocab_size=130048,
        mamba=(24, 128, 256),
        heads=(12, 2, 128),
        d_ff=12288,
    ),
)


@register_family(*RELEASES)
def falcon(release: Falcon, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Mamba-2 without a gated norm beside attention, and SwiGLU, scaled by muP multipliers."""
    ratio = d_model / release.d_model
    heads, channels, _ = recurrent_heads(*release.mamba[:2], ratio)
    wide, inner, hidden = release.d_model, release.mamba[0] * release.mamba[1], release.d_ff
    return repeated(
        "[N,A]F",
        n_blocks,
        d_model=d_model,
        vocab_size=vocab_size,
        embedding_multiplier=32**0.5,
        logits_multiplier=0.0390625 * 1024 / d_model,
        N={
            "d_inner": heads * channels,
            "head_dim": channels,
            "d_state": state_size(release.mamba[2], d_model),
            "gated_norm": False,
            "in_multiplier": 1.25 * 1024 / wide,
            "out_multiplier": 2**0.5 / 6 * 1536 / inner,
        },
        A={
            **attention_heads(*release.heads, ratio),
            "rope_base": 1e11,
            "out_multiplier": 0.9375 * (1024 / wide) ** 2,
        },
        F={
            **SWIGLU,
            "d_ff": width(hidden, ratio),
            "out_multiplier": 0.5859375 * 1024 * 2048 / (wide * hidden),
        },
        **RMSNORM,
    )
