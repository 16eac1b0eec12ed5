"""RWKV-7 "Goose" World (Peng et al. 2025, arXiv 2503.14456): time mix and channel mix in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import Release, layered, register_family
from hybridnas.arch.scaling import width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch

_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class Rwkv7(Release):
    """Sizes of one model."""

    ranks: tuple[int, int, int, int]  # inner widths of decay, rate, values of the first layer, and gate


def _release(name: str, title: str, total: int, d_model: int, n_blocks: int, ranks: tuple[int, int, int, int]) -> Rwkv7:
    return Rwkv7(
        name=name,
        title=f"RWKV-7 World {title}",
        source="arXiv 2503.14456, appendix on model sizes; BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_demo.py",
        total=total,
        counted="by the modules of the authors' code",
        params=title,
        d_model=d_model,
        n_blocks=n_blocks,
        vocab_size=65536,
        ranks=ranks,
    )


RELEASES = (
    _release("rwkv7_0_1b", "0.1B", 191_034_624, 768, 12, (64, 64, 32, 128)),
    _release("rwkv7_0_4b", "0.4B", 450_767_872, 1024, 24, (64, 64, 32, 128)),
    _release("rwkv7_1_5b", "1.5B", 1_527_404_544, 2048, 24, (96, 96, 64, 256)),
    _release("rwkv7_2_9b", "2.9B", 2_947_735_040, 2560, 32, (96, 96, 64, 320)),
)


@register_family(*RELEASES)
def rwkv7(release: Rwkv7, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Heads of 64 channels, values mixed with the first layer's, token shift, relu squared; the embedding is normed."""
    ratio = d_model / release.d_model
    decay, rate, values, gate = (width(rank, ratio) for rank in release.ranks)
    head = _HEAD if d_model % _HEAD == 0 else None
    return layered(
        ("W{value_rank=0}F" if i == 0 else "WF" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm="layernorm",
        norm_eps=1e-5,
        embedding_norm=True,
        final_norm=True,
        W={"head_dim": head, "decay_rank": decay, "rate_rank": rate, "value_rank": values, "gate_rank": gate},
        F={"d_ff": width(4 * release.d_model, ratio), "activation": "relu2", "bias": False, "token_shift": True},
    )
