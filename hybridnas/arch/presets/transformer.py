"""Transformers with dense and with expert feed-forward layers: baselines of MoE-Mamba (arXiv 2401.04081)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.arch.presets import GPT2_VOCAB, PaperModel, register_preset, repeated
from hybridnas.arch.presets.moe_mamba import V1, V2, V2_100M

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


def _heads(n_heads: int | None) -> dict[str, int]:
    """The paper's heads are 64 channels wide, which is the attention block's own default."""
    return {} if n_heads is None else {"n_heads": n_heads}


@register_preset(
    PaperModel(version=1, params="25M", active_params="25M", loss=3.66, recipe=V1),
    PaperModel(version=2, params="25M", active_params="25M", loss=3.43, recipe=V2),
)
def transformer(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    d_ff: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and dense feed-forward in turn: Transformer-25M."""
    return repeated("AF", n_blocks, d_model=d_model, vocab_size=vocab_size, A=_heads(n_heads), d_ff=d_ff or 4 * d_model)


@register_preset(
    PaperModel(version=1, params="545M", active_params="25M", loss=3.54, recipe=V1),
    PaperModel(version=2, params="545M", active_params="25M", loss=3.23, recipe=V2),
)
def transformer_moe(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 32,
    d_expert: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and Switch experts in turn: Transformer-MoE-25M."""
    experts = {"n_experts": n_experts, "d_expert": d_expert or 4 * d_model}
    return repeated("AE", n_blocks, d_model=d_model, vocab_size=vocab_size, A=_heads(n_heads), E=experts)


@register_preset(
    PaperModel(version=2, params="2454M", active_params="114M", loss=2.88, recipe=V2_100M.replace(lr=2.5e-4))
)
def transformer_moe_100m(
    *,
    d_model: int = 768,
    n_blocks: int = 16,
    n_experts: int = 32,
    d_expert: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and Switch experts in turn: Transformer-MoE-100M."""
    return transformer_moe(
        d_model=d_model,
        n_blocks=n_blocks,
        n_experts=n_experts,
        d_expert=d_expert,
        n_heads=n_heads,
        vocab_size=vocab_size,
    )
