"""StripedHyena-7B (Together AI, 2023): Hyena in modal form and attention by turns, a gated MLP after each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class StripedHyena(Release):
    """Sizes of one model."""

    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int


RELEASES = (
    StripedHyena(
        name="stripedhyena_7b",
        title="StripedHyena-7B",
        source="togethercomputer/stripedhyena, configs/7b-sh-32k-v1.yml and stripedhyena/model.py",
        total=7_646_023_680,
        counted="by the formula of its code",
        params="7B",
        d_model=4096,
        n_blocks=32,
        vocab_size=32000,
        heads=(32, 8, 128),
        d_ff=14336,
    ),
)


@register_family(*RELEASES)
def stripedhyena(release: StripedHyena, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Filters of two complex poles behind gates and three taps; rotary attention; SwiGLU."""
    ratio = d_model / release.d_model
    return layered(
        (("A" if i % 2 else "Y") + "F" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        Y={"d_state": 2, "d_conv": 3},
        A={**attention_heads(*release.heads, ratio), "rope_base": 5e5},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        **{**RMSNORM, "norm_eps": 1e-5},
    )
