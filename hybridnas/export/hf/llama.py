"""Llama and Mistral: attention and SwiGLU, in Mistral's first models within a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.export.hf.configs import activation, around, first, heads, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, attention, mlp, norm, surroundings

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": None,
}
MISTRAL = {
    **DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    feed = {"d_ff": config["intermediate_size"], "activation": config.activation(), "gated": True}
    return layered(
        ["AF"] * config["num_hidden_layers"],
        **config.model(),
        A={**config.heads(), **config.rope(), "bias": config["attention_bias"]},
        F={**feed, "bias": config["mlp_bias"]},
    )


def mistral(config: Settings) -> Arch:
    """Return the architecture, its attention within a window where the config has one; no biases."""
    plain = arch(config)
    window = config.given("sliding_window")
    return plain if window is None else plain.replace(A={"window": window})


def config(arch: Arch) -> dict[str, Any]:
    """Return the config of Llama; of Mistral with the window, which Llama has not."""
    pairs, a, f = layers(arch, "A", "F"), first(arch, "A"), first(arch, "F")
    return {
        **around(arch),
        **heads(a, arch.d_model, always=True),
        **rope(a),
        "num_hidden_layers": len(pairs),
        "intermediate_size": f.hidden,
        "hidden_act": activation(f),
        "attention_bias": a.biases[0],
        "mlp_bias": f.bias,
    }


def mistral_config(arch: Arch) -> dict[str, Any]:
    """Return the config of Mistral, which has no biases and may have a window."""
    plain = {name: value for name, value in config(arch).items() if not name.endswith("_bias")}
    return {**plain, "sliding_window": first(arch, "A").window}


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
            yield from mlp(node, f"{there}.mlp")


for name, class_name, defaults, read, write in (
    ("llama", "LlamaForCausalLM", DEFAULTS, arch, config),
    ("mistral", "MistralForCausalLM", MISTRAL, mistral, mistral_config),
):
    register(
        Family(model_types=(name,), class_name=class_name, defaults=defaults, arch=read, pieces=pieces, config=write)
    )
