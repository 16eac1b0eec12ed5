"""MoE-Mamba (arXiv 2401.04081): Mamba and Switch experts in turn, and how the paper trained its models.

``V1``, ``V2`` and ``V2_100M`` are the training settings that the paper's baselines share (other files of this package).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.arch.presets import GPT2_VOCAB, PaperModel, Recipe, register_preset, repeated

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch

# Version 1, Table 3. It gives no schedule, weight decay or optimiser: those are version 2's.
V1 = Recipe(source="v1, Table 3", steps=100_000, batch_size=256, seq_len=256, lr=1e-3)
V2 = Recipe(source="v2, Table 5", steps=150_000, batch_size=64, seq_len=1024, lr=5e-4)
V2_MAMBA = V2.replace(lr=1e-3)
V2_100M = Recipe(source="v2, Table 6", steps=30_000, batch_size=1024, seq_len=1024, lr=5e-4)


@register_preset(PaperModel(version=1, params="416M", active_params="26M", loss=3.41, recipe=V1))
def moe_mamba(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 32,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba of the paper's first version."""
    experts = {"n_experts": n_experts, "d_expert": d_expert or 3 * d_model}
    return repeated("ME", n_blocks, d_model=d_model, vocab_size=vocab_size, E=experts)


@register_preset(PaperModel(version=2, params="542M", active_params="26M", loss=3.19, recipe=V2))
def moe_mamba_42e(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 42,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba-25M of the paper's second version."""
    return moe_mamba(d_model=d_model, n_blocks=n_blocks, n_experts=n_experts, d_expert=d_expert, vocab_size=vocab_size)


# The paper prints 117M active; its own configuration counts 117,522,432, the one cell that does not round to print.
@register_preset(PaperModel(version=2, params="2439M", active_params="117M", loss=2.81, recipe=V2_100M))
def moe_mamba_100m(
    *,
    d_model: int = 768,
    n_blocks: int = 16,
    n_experts: int = 42,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba-100M."""
    return moe_mamba(d_model=d_model, n_blocks=n_blocks, n_experts=n_experts, d_expert=d_expert, vocab_size=vocab_size)
