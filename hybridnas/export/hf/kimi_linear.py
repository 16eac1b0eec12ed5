"""Kimi Linear: Kimi delta attention and latent attention without positions, an MLP or experts after each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, SIGMOID, layered
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import (
    Piece,
    experts,
    latent_attention,
    mlp,
    norm,
    prefix,
    renamed,
    stacked,
    surroundings,
)

DEFAULTS = {
    "vocab_size": 163840,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.446,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_local_experts": 256,
    "mlp_layer_types": None,
    "layer_types": None,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
}


def latent(config: Settings) -> dict[str, Any]:
    """Return the fields of latent attention by DeepSeek's names."""
    heads, q_rank = config["num_attention_heads"], config.given("q_lora_rank")
    if config.given("num_key_value_heads") not in (None, heads):
        why = "but heads of latent attention have keys of their own"
        raise config.refusal("num_key_value_heads", (heads,), why=why)
    if q_rank is None:
        config.need(False, attention_bias="but not on queries without a latent (q_lora_rank is none)")
    return {
        "n_heads": heads,
        "head_dim": config["qk_nope_head_dim"],
        "kv_rank": config["kv_lora_rank"],
        "q_rank": q_rank,
        "rope_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "bias": config["attention_bias"],
        "norm_eps": 1e-6,  # of the class, whatever the config says
    }


def routed(config: Settings) -> dict[str, Any]:
    """Return the fields of DeepSeek's experts by their names."""
    return {
        **DROPLESS,
        **SIGMOID,
        "n_experts": config["num_local_experts"],
        "top_k": config["num_experts_per_tok"],
        "d_expert": config["moe_intermediate_size"],
        "d_shared": config["moe_intermediate_size"] * config["n_shared_experts"],
        "activation": config.activation(),
        "gated": True,
        "routed_scale": float(config["routed_scaling_factor"]),
        "expert_groups": config["n_group"],
        "top_groups": config["topk_group"],
        "renormalize": config["norm_topk_prob"],
    }


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    config.silu()
    released: dict[str, Any] = config.given("linear_attn_config") or {}
    width = released.get("head_dim", config["linear_head_dim"])
    feeds = config["mlp_layer_types"]
    count = config["num_hidden_layers"]
    if feeds is None:
        dense = config.given("first_k_dense_replace", 1)
        feeds = ["dense" if i < dense else "sparse" for i in range(count)]
    return layered(
        (
            ("A" if kind == FULL else "K") + ("F" if feed == "dense" else "E")
            for kind, feed in zip(_types(config, released), feeds, strict=True)
        ),
        **config.model(),
        K={
            "n_heads": released.get("num_heads", config["linear_num_heads"]),
            "head_dim": width,
            "d_conv": released.get("short_conv_kernel_size", config["linear_conv_kernel_dim"]),
            "decay_rank": width,
            "gate_rank": width,
            "norm_eps": config["rms_norm_eps"],
        },
        A={**latent(config), "positions": "none"},
        F={"d_ff": config["intermediate_size"], "activation": config.activation(), "gated": True, "bias": False},
        E=routed(config),
    )


def _types(config: Settings, released: dict[str, Any]) -> list[str]:
    count = config["num_hidden_layers"]
    if config["layer_types"] is not None:
        return config.layer_types(count)
    if "full_attn_layers" in released and "kda_layers" in released:
        return [FULL if i + 1 in released["full_attn_layers"] else LINEAR for i in range(count)]  # counted from 1
    return [FULL if i and i % 4 == 0 else LINEAR for i in range(count)]


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'post_attention' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "K":
            yield from _delta_attention(node, f"{there}.self_attn")
        elif node.slot.letter == "A":
            yield from latent_attention(node, f"{there}.self_attn", interleaved=False)
        elif node.slot.letter == "F":
            yield from mlp(node, f"{there}.mlp")
        else:
            yield from experts(node, f"{there}.mlp", shared="shared_experts")


def _delta_attention(node: Any, there: str) -> Iterator[Piece]:
    shape, ours = node.config.shape, prefix(node)
    keys = shape.key_heads * shape.key_dim
    sizes = {
        "q_proj": keys,
        "k_proj": keys,
        "v_proj": shape.inner,
        "g_a_proj": shape.gate_rank,
        "forget_gate.f_a_proj": shape.decay_in,
        "b_proj": shape.value_heads,
    }
    parts = [(f"{there}.{name}.weight", size) for name, size in sizes.items()]
    yield from stacked(f"{ours}.in_proj.weight", parts)
    yield Piece(ours=f"{ours}.A_log", theirs=f"{there}.forget_gate.A_log", flat=True)
    names = {
        "gate_proj.weight": "g_b_proj.weight",
        "decay_proj.weight": "forget_gate.f_b_proj.weight",
        "dt_bias": "forget_gate.dt_bias",
        "conv1d.weight": "conv1d.weight",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    yield from renamed(names, ours, there)


register(
    Family(
        model_types=("kimi_linear",),
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        aliases={
            "moe_renormalize": "norm_topk_prob",
            "num_expert_group": "n_group",
            "num_experts": "num_local_experts",
            "num_experts_per_token": "num_experts_per_tok",
            "num_shared_experts": "n_shared_experts",
        },
        renames=(
            (r"self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)", r"self_attn.forget_gate.\1"),
            (r"\.block_sparse_moe\.", ".mlp."),
        ),
    )
)
