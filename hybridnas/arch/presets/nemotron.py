"""Nemotron-H (arXiv 2504.03624), Nemotron Nano 2 (2508.14444) and Nemotron 3 Nano (2512.20848) of NVIDIA.

``n_blocks`` counts sub-layers, as the models' own strings do. At another depth than the released one the layers follow
the rule that these strings keep: Mamba-2 and feed-forward in turn, and attention, in the released share, between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import DROPLESS, RMSNORM, SIGMOID, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, recurrent_heads, routing, spread, state_size, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Nemotron(Release):
    """Sizes of one model; ``layers`` is Megatron's string, whose M is our N."""

    layers: str
    mamba: tuple[int, int]  # heads, channels of one; in 8 groups, with a state of 128
    heads: tuple[int, int, int]  # of queries, of keys, channels of one
    d_ff: int = 0
    top_k: int = 0
    d_expert: int = 0
    d_shared: int = 0
    counted: str = "transformers NemotronHForCausalLM"
    vocab_size: int = 131072


_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_12B = "M-M-M-M*-" + 5 * "M-M-M-M*-" + "M-M-M-M-"
_3_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
_3_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
RELEASES = (
    Nemotron(
        name="nemotron_h",
        title="Nemotron-H-8B",
        source="arXiv 2504.03624; NVIDIA-NeMo/Megatron-Bridge, recipes/nemotronh",
        total=8_100_852_736,
        params="8B",
        d_model=4096,
        n_blocks=len(_8B),
        layers=_8B,
        mamba=(128, 64),
        heads=(32, 8, 128),
        d_ff=21504,
    ),
    Nemotron(
        name="nemotron_h_4b",
        title="Nemotron-H-4B",
        source="NVIDIA-NeMo/Megatron-Bridge, recipes/nemotronh",
        total=4_489_223_040,
        params="4B",
        d_model=3072,
        n_blocks=len(_8B),
        layers=_8B,
        mamba=(112, 64),
        heads=(32, 8, 128),
        d_ff=12288,
    ),
    Nemotron(
        name="nemotron_nano_9b_v2",
        title="Nemotron-Nano-9B-v2",
        source="arXiv 2508.14444; NVIDIA-NeMo/Megatron-Bridge, nemotron_nano_v2.py",
        total=8_888_227_328,
        params="9B",
        d_model=4480,
        n_blocks=len(_9B),
        layers=_9B,
        mamba=(128, 80),
        heads=(40, 8, 128),
        d_ff=15680,
    ),
    Nemotron(
        name="nemotron_nano_12b_v2",
        title="Nemotron-Nano-12B-v2",
        source="arXiv 2508.14444; NVIDIA-NeMo/Megatron-Bridge, nemotron_nano_v2.py",
        total=12_310_001_152,
        params="12B",
        d_model=5120,
        n_blocks=len(_12B),
        layers=_12B,
        mamba=(128, 80),
        heads=(40, 8, 128),
        d_ff=20480,
    ),
    Nemotron(
        name="nemotron_3_nano_4b",
        title="Nemotron-3-Nano-4B",
        source="NVIDIA-NeMo/Megatron-Bridge, nemotron_3_nano_4b.py",
        total=3_973_556_832,
        params="4B",
        d_model=3136,
        n_blocks=len(_3_4B),
        layers=_3_4B,
        mamba=(96, 80),
        heads=(40, 8, 128),
        d_ff=12544,
    ),
    Nemotron(
        name="nemotron_3_nano",
        title="Nemotron-3-Nano-30B-A3B",
        source="arXiv 2512.20848; NVIDIA-NeMo/Megatron-Bridge, nemotron_3_nano.py",
        total=31_577_937_344,
        params="31.6B",
        active_params="3.2B",
        d_model=2688,
        n_blocks=len(_3_30B),
        vocab_size=131072,
        n_experts=128,
        layers=_3_30B,
        mamba=(64, 64),
        heads=(32, 2, 128),
        top_k=6,
        d_expert=1856,
        d_shared=3712,
    ),
)


@register_family(*RELEASES)
def nemotron(release: Nemotron, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Mamba-2 and squared-ReLU feed-forward layers, one layer in ten attention without positions."""
    ratio = d_model / release.d_model
    heads, channels, groups = recurrent_heads(*release.mamba, ratio, groups=8)
    return layered(
        _letters(release, n_blocks),
        d_model=d_model,
        vocab_size=vocab_size,
        N={
            "d_inner": heads * channels,
            "head_dim": channels,
            "n_groups": groups,
            "d_state": state_size(128, d_model),
        },
        A={**attention_heads(*release.heads, ratio), "positions": "none"},
        F={"d_ff": width(release.d_ff, ratio), "activation": "relu2", "bias": False},
        E={
            **routing(release.top_k, release.d_expert, n_experts, ratio),
            **DROPLESS,
            **SIGMOID,
            "activation": "relu2",
            "routed_scale": 2.5,
            "d_shared": width(release.d_shared, ratio),
        },
        **RMSNORM,
    )


def _letters(release: Nemotron, n_blocks: int) -> str:
    """Return the layers in our letters: as released, or Mamba-2 and feed-forward in turn with attention between."""
    released = release.layers.replace("M", "N").replace("*", "A").replace("-", "F")
    if n_blocks == release.n_blocks:
        return released
    places = spread([i for i, letter in enumerate(released) if letter == "A"], len(released), n_blocks)
    letters = (["N", "E" if release.n_experts else "F"] * n_blocks)[: n_blocks - len(places)]
    for already, place in enumerate(places):
        after_mixer = (place - already) | 1
        letters.insert(min(after_mixer + already, len(letters)), "A")
    return "".join(letters)
