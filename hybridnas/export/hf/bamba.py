"""Bamba: Mamba-2 and a few layers of attention that turns half of each head, an MLP after each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import SWIGLU, layered
from hybridnas.export.hf.configs import activation, around, first, heads, layers, places, rope
from hybridnas.export.hf.configs import mamba2 as mamba2_config
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, attention, mamba2, mlp, norm, surroundings

DEFAULTS = {
    "vocab_size": 128000,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attn_layer_indices": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, math.inf],
    "rope_parameters": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    attention = config["attn_layer_indices"] or ()
    turned = (config["rope_parameters"] or {}).get("partial_rotary_factor", 0.5)  # beside them, none is read
    feed = {"d_ff": config["intermediate_size"], "activation": config.activation(), "gated": True}
    return layered(
        ("AF" if i in attention else "NF" for i in range(config["num_hidden_layers"])),
        **config.model(),
        N=config.mamba2(),
        A={**config.heads(), **config.rope(), "rotary_fraction": turned, "bias": config["attention_bias"]},
        F={**feed, "bias": config["mlp_bias"]},
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture."""
    pairs, a, f = layers(arch, "NA", "F"), first(arch, "A"), first(arch, "F")
    return {
        **around(arch),
        **heads(a, arch.d_model),
        **rope(a, fraction=True),
        **mamba2_config(first(arch, "N"), arch.d_model),
        "num_hidden_layers": len(pairs),
        "attn_layer_indices": places(pairs, "A"),
        "intermediate_size": f.hidden,
        "hidden_act": activation(f),
        "attention_bias": a is not None and a.biases[0],
        "mlp_bias": f.bias,
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.final_layernorm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'pre_ff' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "N":
            yield from mamba2(node, f"{there}.mamba")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        else:
            yield from mlp(node, f"{there}.feed_forward")


register(
    Family(
        model_types=("bamba",),
        class_name="BambaForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        style={"F": SWIGLU, "A": {"rotary_fraction": 0.5}},
    )
)
