"""Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060) as their authors released them: one mixer in every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, Release, register_family, repeated
from hybridnas.arch.scaling import state_size

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


def _release(name: str, title: str, total: int, d_model: int, n_blocks: int, params: str) -> Release:
    second = name.startswith("mamba2")
    return Release(
        name=name,
        title=title,
        source="state-spaces/mamba, config.json of the checkpoint",
        total=total,
        counted=f"transformers {'Mamba2' if second else 'Mamba'}ForCausalLM",
        params=params,
        d_model=d_model,
        n_blocks=n_blocks,
        vocab_size=50288 if second else 50280,
    )


MAMBA = (
    _release("mamba_130m", "Mamba-130M", 129_135_360, 768, 24, "130M"),
    _release("mamba_370m", "Mamba-370M", 371_516_416, 1024, 48, "370M"),
    _release("mamba_790m", "Mamba-790M", 793_204_224, 1536, 48, "790M"),
    _release("mamba_1_4b", "Mamba-1.4B", 1_372_178_432, 2048, 48, "1.4B"),
    _release("mamba_2_8b", "Mamba-2.8B", 2_768_345_600, 2560, 64, "2.8B"),
)
MAMBA2 = (
    _release("mamba2_130m", "Mamba2-130M", 128_989_632, 768, 24, "130M"),
    _release("mamba2_370m", "Mamba2-370M", 368_346_624, 1024, 48, "370M"),
    _release("mamba2_780m", "Mamba2-780M", 780_161_280, 1536, 48, "780M"),
    _release("mamba2_1_3b", "Mamba2-1.3B", 1_343_757_312, 2048, 48, "1.3B"),
    _release("mamba2_2_7b", "Mamba2-2.7B", 2_702_599_680, 2560, 64, "2.7B"),
)


@register_family(*MAMBA)
def mamba_released(release: Release, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Mamba in every layer, embedding and head tied."""
    return repeated("M", n_blocks, d_model=d_model, vocab_size=vocab_size, tie_embeddings=True, **RMSNORM)


@register_family(*MAMBA2)
def mamba2_released(release: Release, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Mamba-2 in every layer, embedding and head tied."""
    mixer = {"d_state": state_size(128, d_model)}
    return repeated("N", n_blocks, d_model=d_model, vocab_size=vocab_size, tie_embeddings=True, N=mixer, **RMSNORM)
