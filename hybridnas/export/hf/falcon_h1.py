"""Falcon-H1: Mamba-2 beside attention, then an MLP, with muP multipliers.

Multipliers of rows of a matrix (the parts of Mamba-2's first one, the keys, the MLP's gate) become part of the matrix:
exact in float32, and rounded once more in the dtype of narrower weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.export.hf.configs import activation, around, check_parallel, first, heads, rope
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
    "mamba_d_ssm": 1024,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_norm_before_gate": True,
    "mamba_rms_norm": False,
    "time_step_limit": [0.0, math.inf],
    "projectors_bias": False,
    "rope_parameters": None,
    "lm_head_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "mlp_multipliers": None,
    "key_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "attention_in_multiplier": 1.0,
    "ssm_multipliers": None,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    if config["mamba_rms_norm"]:
        config.need(False, mamba_norm_before_gate="and our gate stands before the norm")
    if config["projectors_bias"] != config["mamba_proj_bias"]:
        why = "beside another mamba_proj_bias, and our two projections both have a bias or none"
        raise config.refusal("projectors_bias", (config["mamba_proj_bias"],), why=why)
    return layered(
        ["[N,A]F"] * config["num_hidden_layers"],
        **config.model(),
        embedding_multiplier=float(config["embedding_multiplier"]),
        logits_multiplier=float(config["lm_head_multiplier"]),
        N={
            **config.mamba2(),
            "gated_norm": config["mamba_rms_norm"],
            "in_multiplier": float(config["ssm_in_multiplier"]),
            "out_multiplier": float(config["ssm_out_multiplier"]),
        },
        A={
            **config.heads(),
            **config.rope(),
            "bias": config["attention_bias"],
            "in_multiplier": float(config["attention_in_multiplier"]),
            "out_multiplier": float(config["attention_out_multiplier"]),
        },
        F={
            "d_ff": config["intermediate_size"],
            "activation": config.activation(),
            "gated": True,
            "bias": config["mlp_bias"],
            "out_multiplier": float((config["mlp_multipliers"] or (1.0, 1.0))[1]),
        },
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture; multipliers of rows of a matrix are part of the matrix."""
    count = check_parallel(arch)
    n, a, f = (first(arch, letter) for letter in "NAF")
    return {
        **around(arch),
        **heads(a, arch.d_model, always=True),
        **rope(a),
        **mamba2_config(n, arch.d_model, expand=False),
        "mamba_d_ssm": n.width,
        "mamba_rms_norm": n.gated_norm,
        "mamba_norm_before_gate": False,
        "projectors_bias": n.bias,
        "num_hidden_layers": count,
        "intermediate_size": f.hidden,
        "hidden_act": activation(f),
        "attention_bias": a.biases[0],
        "mlp_bias": f.bias,
        "embedding_multiplier": arch.model.embedding_multiplier,
        "lm_head_multiplier": arch.model.logits_multiplier,
        "key_multiplier": 1.0,
        "attention_in_multiplier": a.in_multiplier,
        "attention_out_multiplier": a.out_multiplier,
        "ssm_in_multiplier": n.in_multiplier,
        "ssm_out_multiplier": n.out_multiplier,
        "ssm_multipliers": [1.0] * 5,
        "mlp_multipliers": [1.0, f.out_multiplier],
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.final_layernorm")
    of_part = config["ssm_multipliers"] or [1.0] * 5
    gate_factor = (config["mlp_multipliers"] or (1.0, 1.0))[0]
    for node in arch.nodes:
        own: Any = node.config
        there = f"model.layers.{node.layer // 2}"
        if node.slot.letter == "N":  # the layer's one norm comes with it
            yield norm(node, f"{there}.input_layernorm")
            sizes = torch.tensor([own.width, own.width, *[own.n_groups * own.d_state] * 2, own.heads])
            yield from mamba2(node, f"{there}.mamba", torch.tensor(of_part).repeat_interleave(sizes))
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn", key_factor=config["key_multiplier"])
        else:
            yield norm(node, f"{there}.pre_ff_layernorm")
            yield from mlp(node, f"{there}.feed_forward", gate_factor=gate_factor)


register(
    Family(
        model_types=("falcon_h1",),
        class_name="FalconH1ForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        unused=(r".*\.mamba\.mup_vector",),
    )
)
