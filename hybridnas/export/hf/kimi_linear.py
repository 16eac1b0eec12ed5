"""Kimi Linear: Kimi delta attention and latent attention without positions, an MLP or experts after each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, SIGMOID, layered
from hybridnas.errors import ConfigError
from hybridnas.export.hf.configs import activation, around, first, layers
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import (
    Hub,
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


def latent_config(a: Any) -> dict[str, Any]:
    """Return latent attention by DeepSeek's names; raises ConfigError for attention of another kind."""
    if a.kv_rank is None:
        raise ConfigError(
            "the attention has kv_rank=None, and the class has latent attention alone",
            field="kv_rank",
            got=None,
            allowed=">= 1",
        )
    return {
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.heads,
        "kv_lora_rank": a.kv_rank,
        "q_lora_rank": a.q_rank,
        "qk_rope_head_dim": a.rotary,
        "qk_nope_head_dim": a.head_width,
        "v_head_dim": a.value_width,
        "attention_bias": a.biases[0],
    }


def experts_config(e: Any) -> dict[str, Any]:
    """Return DeepSeek's experts, the shared one as wide as several routed ones (of zeros where there is none).

    Raises ConfigError where it is not.
    """
    if e.d_shared % e.hidden:
        raise ConfigError(
            f"the experts have d_shared={e.d_shared}, and the class has multiples of d_expert={e.hidden}",
            field="d_shared",
            got=e.d_shared,
            allowed=f"a multiple of {e.hidden}",
        )
    return {
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.hidden,
        "n_shared_experts": e.d_shared // e.hidden or 1,
        "routed_scaling_factor": e.routed_scale,
        "n_group": e.expert_groups,
        "topk_group": e.top_groups,
        "norm_topk_prob": e.renormalize,
    }


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture, by the names of transformers and by those of the release."""
    pairs = layers(arch, "KA", "FE")
    k, a, f, e = (first(arch, letter) for letter in "KAFE")
    found: dict[str, Any] = {
        **around(arch),
        "num_hidden_layers": len(pairs),
        "layer_types": [FULL if "A" in pair else LINEAR for pair in pairs],
        "mlp_layer_types": ["dense" if "F" in pair else "sparse" for pair in pairs],
        "intermediate_size": (f or e).hidden,
        "hidden_act": activation(f, e),
    }
    if k is not None:
        found |= {"linear_head_dim": k.key_dim, "linear_num_heads": k.heads, "linear_conv_kernel_dim": k.d_conv}
    if a is not None:
        found |= latent_config(a)
    if e is not None:
        shared = experts_config(e)
        for theirs, name in ALIASES.items():
            if name in shared:
                shared[theirs] = shared.pop(name)
        found |= {**shared, "num_experts": e.n_experts}
    return found


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
    yield Piece(ours=f"{ours}.A_log", theirs=f"{there}.forget_gate.A_log", shape=(1, 1, -1, 1))
    names = {
        "gate_proj.weight": "g_b_proj.weight",
        "decay_proj.weight": "forget_gate.f_b_proj.weight",
        "dt_bias": "forget_gate.dt_bias",
        "conv1d.weight": "conv1d.weight",
        "norm.weight": "o_norm.weight",
        "out_proj.weight": "o_proj.weight",
    }
    yield from renamed(names, ours, there)


ALIASES = {
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
register(
    Family(
        model_types=("kimi_linear",),
        class_name="KimiLinearForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        aliases=ALIASES,
        renames=(
            (r"self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)", r"self_attn.forget_gate.\1"),
            (r"\.block_sparse_moe\.", ".mlp."),
        ),
        hub=Hub(
            renames=(
                (r"\.forget_gate\.", "."),
                (r"\.mlp\.(experts|gate|shared_experts)\.", r".block_sparse_moe.\1."),
            ),
            experts=("w1", "w3", "w2"),
            split_convolutions=True,
        ),
    )
)
