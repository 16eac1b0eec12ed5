"""RecurrentGemma (Google DeepMind, arXiv 2404.07839): Griffin's RG-LRU, every third layer windowed attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class RecurrentGemma(Release):
    """Sizes of one model. ``d_ff`` is the width that is built: half of config.json's."""

    heads: int  # of queries, and blocks of the gates' matrices
    d_ff: int
    source: str = "arXiv 2404.07839, table 1; recurrentgemma/common.py of the makers' code"
    counted: str = "transformers RecurrentGemmaForCausalLM"
    vocab_size: int = 256000


RELEASES = (
    RecurrentGemma(
        name="recurrent_gemma_2b",
        title="RecurrentGemma-2B",
        total=2_682_862_080,
        params="2.7B",
        d_model=2560,
        n_blocks=26,
        heads=10,
        d_ff=7680,
    ),
    RecurrentGemma(
        name="recurrent_gemma_9b",
        title="RecurrentGemma-9B",
        total=8_579_977_216,
        params="8.6B",
        d_model=4096,
        n_blocks=38,
        heads=16,
        d_ff=12288,
    ),
)


def root_of_width(d_model: int) -> float:
    """Return the factor on the embedding: sqrt(d_model) in bfloat16, as the makers compute it in any dtype."""
    part, exponent = math.frexp(d_model**0.5)
    return math.ldexp(round(part * 256), exponent - 8)


@register_family(*RELEASES)
def recurrent_gemma(release: RecurrentGemma, *, d_model: int, n_blocks: int, vocab_size: int) -> Arch:
    """Two RG-LRU to one attention over 2,048 tokens with one key head and half rotary heads; gated GELU."""
    ratio = d_model / release.d_model
    heads = attention_heads(release.heads, 1, release.d_model // release.heads, ratio)
    attention = every(3, 2, n_blocks)
    return layered(
        (("A" if i in attention else "R") + "F" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        tie_embeddings=True,
        norm="rmsnorm_zero",
        norm_eps=1e-6,
        final_norm=True,
        embedding_multiplier=root_of_width(d_model),
        final_softcap=30.0,
        R={"d_inner": d_model, "gate_blocks": release.heads if ratio == 1 else None},
        A={**heads, "window": 2048, "rotary_fraction": 0.5, "out_bias": True},
        F={"d_ff": width(release.d_ff, ratio), "activation": "gelu_tanh", "gated": True, "bias": True},
    )
