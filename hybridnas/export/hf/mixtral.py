"""Mixtral: attention and routed SwiGLU experts in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, layered
from hybridnas.export.hf.configs import activation, around, first, heads, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, experts, norm, surroundings

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
    "rope_parameters": None,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    return layered(
        ["AE"] * config["num_hidden_layers"],
        **config.model(),
        A={**config.heads(), **config.rope(1e6), "window": config["sliding_window"]},
        E={
            **DROPLESS,
            "n_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["intermediate_size"],
            "activation": config.activation(),
            "gated": True,
            "router": "top_k",
            "renormalize": True,
            "load_balance_weight": config["router_aux_loss_coef"],
        },
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture."""
    pairs, a, e = layers(arch, "A", "E"), first(arch, "A"), first(arch, "E")
    return {
        **around(arch),
        **heads(a, arch.d_model, always=True),
        **rope(a),
        "num_hidden_layers": len(pairs),
        "intermediate_size": e.hidden,
        "hidden_act": activation(e),
        "sliding_window": a.window,
        "num_local_experts": e.n_experts,
        "num_experts_per_tok": e.top_k,
        "router_aux_loss_coef": e.load_balance_weight,
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        if node.slot.letter == "A":
            yield norm(node, f"{there}.input_layernorm")
            yield from attention(node, f"{there}.self_attn")
        else:
            yield norm(node, f"{there}.post_attention_layernorm")
            yield from experts(node, f"{there}.mlp")


register(
    Family(
        model_types=("mixtral",),
        class_name="MixtralForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        aliases={"num_experts": "num_local_experts"},
        renames=((r"\.block_sparse_moe\.", ".mlp."),),
        hub=Hub(renames=((r"\.mlp\.", ".block_sparse_moe."),), experts=("w1", "w3", "w2")),
    )
)
