"""Mamba alone, and Mamba with dense feed-forward layers: baselines of MoE-Mamba (arXiv 2401.04081)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.arch.presets import GPT2_VOCAB, PaperModel, register_preset, repeated
from hybridnas.arch.presets.moe_mamba import V1, V2_100M, V2_MAMBA

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@register_preset(
    PaperModel(version=1, params="27M", active_params="27M", loss=3.51, recipe=V1),
    PaperModel(version=2, params="27M", active_params="27M", loss=3.34, recipe=V2_MAMBA),
)
def mamba(*, d_model: int = 512, n_blocks: int = 16, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba alone: Mamba-25M."""
    return repeated("M", n_blocks, d_model=d_model, vocab_size=vocab_size)


@register_preset(PaperModel(version=1, params="26M", active_params="26M", loss=3.56, recipe=V1))
def mamba_mlp(*, d_model: int = 512, n_blocks: int = 8, d_ff: int | None = None, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba and dense feed-forward in turn: Mamba-MLP."""
    return repeated("MF", n_blocks, d_model=d_model, vocab_size=vocab_size, d_ff=d_ff or 3 * d_model)


@register_preset(PaperModel(version=2, params="121M", active_params="121M", loss=2.99, recipe=V2_100M.replace(lr=1e-3)))
def mamba_100m(*, d_model: int = 768, n_blocks: int = 32, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba alone: Mamba-100M."""
    return mamba(d_model=d_model, n_blocks=n_blocks, vocab_size=vocab_size)
