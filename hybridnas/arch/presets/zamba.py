"""Zamba2 (Zyphra 2024, arXiv 2411.15242): Mamba-2 layers, and one or two shared blocks in front of some of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, spread, state_size, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Zamba2(Release):
    """Sizes of one model."""

    hybrid: tuple[int, ...]  # layers in which a shared block stands before Mamba-2, counted from 0
    shared_blocks: int  # which take turns
    d_state: int  # of a Mamba-2 head
    d_ff: int
    attention_adapters: bool
    rope: bool


_RANK, _HEADS = 128, 32

RELEASES = (
    Zamba2(
        name="zamba2_1_2b",
        title="Zamba2-1.2B",
        source="arXiv 2411.15242; transformers Zamba2Config; the header of the released weights counts the same",
        total=1_215_064_704,
        counted="transformers Zamba2ForCausalLM",
        params="1.2B",
        d_model=2048,
        n_blocks=38,
        vocab_size=32000,
        hybrid=(5, 11, 17, 23, 29, 35),
        shared_blocks=1,
        d_state=128,
        d_ff=8192,
        attention_adapters=True,
        rope=True,
    ),
    Zamba2(
        name="zamba2_2_7b",
        title="Zamba2-2.7B",
        source="Zyphra/Zamba2-2.7B config.json; transformers Zamba2Config",
        total=2_662_214_560,
        counted="transformers Zamba2ForCausalLM",
        params="2.7B",
        d_model=2560,
        n_blocks=54,
        vocab_size=32000,
        hybrid=(6, 12, 18, 24, 30, 36, 42, 47, 51),
        shared_blocks=2,
        d_state=64,
        d_ff=10240,
        attention_adapters=False,
        rope=False,
    ),
)


@register_family(*RELEASES)
def zamba2(release: Zamba2, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Shared attention and MLP on [x, embedding] with low-rank adapters at each place, read by the Mamba-2 behind."""
    ratio = d_model / release.d_model
    inner = 2 * d_model
    channels = min(64, max(1, inner // 32))  # of a Mamba-2 head; at least 32 heads
    places = spread(release.hybrid, release.n_blocks, n_blocks)
    names = {place: "ab"[turn % release.shared_blocks] for turn, place in enumerate(places)}
    shared = attention_heads(_HEADS, _HEADS, 2 * release.d_model // _HEADS, ratio)
    rank = max(1, round(_RANK * ratio))
    return layered(
        (f"[Z@{names[i]}N]" if i in names else "N" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        tie_embeddings=True,
        N={
            "d_inner": inner // channels * channels,
            "head_dim": channels,
            "n_groups": 1,
            "d_state": state_size(release.d_state, d_model),
            "d_conv": 4,
        },
        Z={
            **shared,
            "d_ff": width(release.d_ff, ratio),
            "positions": "rope" if release.rope else "none",
            "mlp_rank": rank,
            "attention_rank": rank if release.attention_adapters else 0,
            "skip": True,
            "norm_position": "post",
        },
        **{**RMSNORM, "norm_eps": 1e-5},
    )
