"""OpenMoE (arXiv 2402.01739): a Transformer in which a few layers have experts, and a dense MLP after them as well.

In the released code the gate of every MLP and expert is itself gated, ``silu(a) * b * c`` of four matrices; here they
are SwiGLU of three, so that a preset is smaller than the release by ``d_model * d_ff`` for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.arch.presets import RMSNORM, SWIGLU, Release, layered, register_family
from hybridnas.arch.scaling import attention_heads, every, routing, width

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class OpenMoe(Release):
    """Sizes of one model; ``period``: every which layer has experts."""

    period: int
    heads: tuple[int, int]  # number, channels of one
    d_ff: int  # of the MLPs and of each of the experts
    source: str = "hpcaitech/ColossalAI, examples/language/openmoe/model"
    counted: str = "formula of modeling_openmoe.py, head not tied"
    lacks: str = "a second gate in every MLP and expert"
    vocab_size: int = 256384


RELEASES = (
    OpenMoe(
        name="openmoe_base",
        title="OpenMoE-base",
        total=799_663_104,
        params="637M",
        d_model=768,
        n_blocks=12,
        n_experts=16,
        period=4,
        heads=(12, 64),
        d_ff=2048,
    ),
    OpenMoe(
        name="openmoe_8b",
        title="OpenMoE-8B",
        total=11_855_046_656,
        params="8B",
        d_model=2048,
        n_blocks=24,
        n_experts=32,
        period=6,
        heads=(24, 128),
        d_ff=8192,
    ),
)


@register_family(*RELEASES)
def openmoe(release: OpenMoe, *, d_model: int, n_blocks: int, n_experts: int, vocab_size: int) -> Arch:
    """Attention and SwiGLU; every fourth or sixth layer has experts between them."""
    ratio = d_model / release.d_model
    heads, channels = release.heads
    sparse = every(release.period, release.period - 1, n_blocks)
    return layered(
        ("AEF" if i in sparse else "AF" for i in range(n_blocks)),
        d_model=d_model,
        vocab_size=vocab_size,
        norm_eps=1e-6,
        A={**attention_heads(heads, heads, channels, ratio), "scale": 1.0},
        F={**SWIGLU, "d_ff": width(release.d_ff, ratio)},
        E={
            **routing(2, release.d_ff, n_experts, ratio),
            **SWIGLU,
            "router": "top_k",
            "capacity_factor": 1.25,
            "eval_capacity_factor": 2.0,
            "load_balance_weight": 0.01,
            "router_z_weight": 0.0001,
            "init_over_experts": False,
        },
        **RMSNORM,
    )
