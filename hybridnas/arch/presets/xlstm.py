"""xLSTM-7B (NXAI, arXiv 2503.13427): mLSTM in every layer, each followed by a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, register_family, repeated
from hybridnas.arch.scaling import recurrent_heads, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class XLstm(Release):
    """Sizes of one model."""

    heads: tuple[int, int]  # number, value channels of one
    d_ff: int


RELEASES = (
    XLstm(
        name="xlstm_7b",
        title="xLSTM-7B",
        source="arXiv 2503.13427, table 4; transformers xLSTMConfig",
        total=6_865_424_896,
        counted="transformers xLSTMForCausalLM",
        params="7B",
        d_model=4096,
        n_blocks=32,
        vocab_size=50304,
        heads=(8, 512),
        d_ff=10944,
    ),
)


@register_family(*RELEASES)
def xlstm(release: XLstm, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Matrix LSTM with keys half as wide as values and gates capped at 15, then SwiGLU; logits capped at 30."""
    ratio = d_model / release.d_model
    heads, value_dim, _ = recurrent_heads(*release.heads, ratio)
    return repeated(
        "XF",
        n_blocks,
        d_model=d_model,
        vocab_size=vocab_size,
        norm_eps=1e-6,
        final_softcap=30.0,
        X={"n_heads": heads, "d_inner": heads * value_dim, "head_dim": max(1, value_dim // 2)},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        **RMSNORM,
    )
