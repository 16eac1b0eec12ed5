"""Granite 4.0 H: Mamba-2 and a few layers of attention, each with an MLP, or experts and a shared one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, layered
from hybridnas.export.hf.configs import activation, around, first, heads, layers, rope
from hybridnas.export.hf.configs import mamba2 as mamba2_config
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, experts, mamba2, norm, prefix, renamed, surroundings

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "shared_intermediate_size": 1024,
    "position_embedding_type": None,
    "layer_types": None,
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "time_step_limit": [0.0, math.inf],
}


def arch(config: Settings) -> Arch:
    """Return the architecture: with experts in all layers, or in none."""
    count = config["num_hidden_layers"]
    types = [LINEAR] * count if config["layer_types"] is None else config.layer_types(count)
    feed: dict[str, Any] = {"activation": config.activation(), "gated": True}
    routed = config["num_local_experts"] > 0
    positions = {"positions": "none"} if config["position_embedding_type"] != "rope" else config.rope()
    return layered(
        (("A" if kind == FULL else "N") + ("E" if routed else "F") for kind in types),
        **config.model(),
        embedding_multiplier=float(config["embedding_multiplier"]),
        logits_multiplier=1 / config["logits_scaling"],
        out_multiplier=float(config["residual_multiplier"]),
        N=config.mamba2(),
        A={
            **config.heads(),
            **positions,
            "scale": float(config["attention_multiplier"]),
            "bias": config["attention_bias"],
        },
        F={**feed, "d_ff": config["shared_intermediate_size"], "bias": False},
        E={
            **DROPLESS,
            **feed,
            "n_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["intermediate_size"],
            "d_shared": config["shared_intermediate_size"],
            "router": "top_k",
            "renormalize": True,
            "load_balance_weight": config["router_aux_loss_coef"],
        },
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture; experts without a shared one get one of a channel, of zeros."""
    routed = first(arch, "E") is not None
    pairs = layers(arch, "NA", "E" if routed else "F")
    a, f, e = (first(arch, letter) for letter in "AFE")
    turned = a is not None and a.positions == "rope"
    mixer = first(arch, "A") or first(arch, "N")
    found: dict[str, Any] = {
        **around(arch),
        **heads(a, arch.d_model),
        **(rope(a) if turned else {}),
        **mamba2_config(first(arch, "N"), arch.d_model),
        "num_hidden_layers": len(pairs),
        "layer_types": ["attention" if "A" in pair else "mamba" for pair in pairs],
        "position_embedding_type": "rope" if turned else "nope",
        "hidden_act": activation(f, e),
        "attention_bias": a is not None and a.biases[0],
        "embedding_multiplier": arch.model.embedding_multiplier,
        "logits_scaling": 1 / arch.model.logits_multiplier,
        "residual_multiplier": mixer.out_multiplier,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
    }
    if a is not None:
        found["attention_multiplier"] = a.head_width**-0.5 if a.scale is None else a.scale
    if e is None:
        return {**found, "shared_intermediate_size": f.hidden, "intermediate_size": f.hidden}
    return {
        **found,
        "num_local_experts": e.n_experts,
        "num_experts_per_tok": e.top_k,
        "intermediate_size": e.hidden,
        "shared_intermediate_size": e.d_shared or 1,
        "router_aux_loss_coef": e.load_balance_weight,
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what; gate and value of the MLP are one matrix there too."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    both = {"up_proj.weight": "input_linear.weight", "down_proj.weight": "output_linear.weight"}
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'post_attention' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "N":
            yield from mamba2(node, f"{there}.mamba")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        else:
            if node.slot.letter == "E":
                yield from experts(node, f"{there}.block_sparse_moe", router="router")
            mlp = "shared" if node.slot.letter == "E" else "ff"
            yield from renamed(both, f"{prefix(node)}.{mlp}", f"{there}.shared_mlp")


register(
    Family(
        model_types=("granitemoehybrid",),
        class_name="GraniteMoeHybridForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        aliases={"layers_block_type": "layer_types"},
        renames=(
            (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
            (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
            (r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
        ),
        hub=Hub(
            renames=(
                (r"block_sparse_moe\.experts\.gate_up_proj", "block_sparse_moe.input_linear.weight"),
                (r"block_sparse_moe\.experts\.down_proj", "block_sparse_moe.output_linear.weight"),
                (r"block_sparse_moe\.router\.weight", "block_sparse_moe.router.layer.weight"),
            ),
            experts=None,
        ),
    )
)
