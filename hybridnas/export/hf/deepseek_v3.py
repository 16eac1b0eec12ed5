"""DeepSeek-V3: latent attention, MLPs in the first layers and experts in groups in the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.export.hf.configs import activation, around, first, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.kimi_linear import experts_config, latent, latent_config, routed
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, experts, latent_attention, mlp, norm, surroundings

DEFAULTS = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "num_local_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "rope_interleave": True,
    "attention_bias": False,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    dense = config["first_k_dense_replace"]
    return layered(
        ("AF" if i < dense else "AE" for i in range(config["num_hidden_layers"])),
        **config.model(),
        A={**latent(config), **config.rope()},
        F={"d_ff": config["intermediate_size"], "activation": config.activation(), "gated": True, "bias": False},
        E=routed(config),
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture."""
    pairs = layers(arch, "A", "FE")
    a, f, e = (first(arch, letter) for letter in "AFE")
    found = {
        **around(arch),
        **latent_config(a),
        **rope(a),
        "rope_interleave": True,
        "num_hidden_layers": len(pairs),
        "first_k_dense_replace": next((i for i, pair in enumerate(pairs) if "E" in pair), len(pairs)),
        "intermediate_size": (f or e).hidden,
        "hidden_act": activation(f, e),
    }
    return found if e is None else {**found, **experts_config(e), "n_routed_experts": e.n_experts}


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'post_attention' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "A":
            yield from latent_attention(node, f"{there}.self_attn", interleaved=config["rope_interleave"])
        elif node.slot.letter == "F":
            yield from mlp(node, f"{there}.mlp")
        else:
            yield from experts(node, f"{there}.mlp", shared="shared_experts")


register(
    Family(
        model_types=("deepseek_v3",),
        class_name="DeepseekV3ForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        aliases={"n_routed_experts": "num_local_experts"},
        unused=(r"model\.layers\.61\.",),  # the head for a token further ahead, beside 61 layers
    )
)
