"""LFM2 and LFM2-MoE: gated short convolutions and attention with normed queries and keys, an MLP or experts each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.presets import DROPLESS, SIGMOID, layered
from hybridnas.export.hf.configs import around, first, heads, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, experts, mlp, norm, prefix, renamed, surroundings

_SHARED = {
    "vocab_size": 65536,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": None,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": None,
}
LFM2 = {
    **_SHARED,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": None,
}
LFM2_MOE = {
    **_SHARED,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_dense_layers": 2,
    "num_experts_per_tok": 4,
    "num_experts": 32,
    "use_expert_bias": True,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
}
_RENORMALIZE_EPS = 1e-6  # of the class


def lfm2(config: Settings) -> Arch:
    """Return the architecture; the MLP is narrower than ``intermediate_size`` where the config says so."""
    width = config["intermediate_size"]
    if config["block_auto_adjust_ff_dim"]:
        multiple = config["block_multiple_of"]
        width = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3))
        width = multiple * -(-width // multiple)
    types = config["layer_types"]
    if types is None:
        attention = config["full_attn_idxs"]
        types = [FULL if attention is None or i in attention else "conv" for i in range(config["num_hidden_layers"])]
    return _arch(config, types, ["F"] * len(types), width)


def lfm2_moe(config: Settings) -> Arch:
    """Return the architecture, with MLPs in the first layers and experts in the others."""
    types = config["layer_types"]
    if types is None:
        raise config.refusal("layer_types", "one word per layer")
    feed = ["F" if i < config["num_dense_layers"] else "E" for i in range(len(types))]
    routed = {
        **DROPLESS,
        **SIGMOID,
        "n_experts": config["num_experts"],
        "top_k": config["num_experts_per_tok"],
        "d_expert": config["moe_intermediate_size"],
        "correction_bias": config["use_expert_bias"],
        "routed_scale": float(config["routed_scaling_factor"]),
        "renormalize": config["norm_topk_prob"],
        "renormalize_eps": _RENORMALIZE_EPS,
        "activation": "silu",
        "gated": True,
    }
    return _arch(config, types, feed, config["intermediate_size"], routed)


def _arch(
    config: Settings, types: list[str], feed: list[str], width: int, routed: dict[str, Any] | None = None
) -> Arch:
    if config["layer_types"] is not None:
        types = config.layer_types(config["num_hidden_layers"], own=("conv",))
    letters = {FULL: "A", "conv": "C"}
    for kind in types:
        if kind not in letters:
            raise config.refusal("layer_types", tuple(letters), got=kind)
    return layered(
        (letters[kind] + own for kind, own in zip(types, feed, strict=True)),
        **config.model("norm_eps"),
        C={"d_conv": config["conv_L_cache"], "conv_bias": config["conv_bias"], "bias": config["conv_bias"]},
        A={**config.heads(), **config.rope(1e6), "qk_norm": "head", "norm_eps": config["norm_eps"]},
        F={"d_ff": width, "activation": "silu", "gated": True, "bias": False},
        E=routed or {},
    )


def lfm2_config(arch: Arch) -> dict[str, Any]:
    """Return the config of LFM2, with the MLP's own width."""
    width = first(arch, "F").hidden if first(arch, "F") is not None else 0
    return {
        **_config(arch, layers(arch, "CA", "F")),
        "intermediate_size": width,
        "block_ff_dim": width,
        "block_auto_adjust_ff_dim": False,
    }


def lfm2_moe_config(arch: Arch) -> dict[str, Any]:
    """Return the config of LFM2-MoE."""
    pairs = layers(arch, "CA", "FE")
    f, e = first(arch, "F"), first(arch, "E")
    found = {
        **_config(arch, pairs),
        "num_dense_layers": next((i for i, pair in enumerate(pairs) if "E" in pair), len(pairs)),
        "intermediate_size": (f or e).hidden,
    }
    if e is not None:
        found |= {
            "num_experts": e.n_experts,
            "num_experts_per_tok": e.top_k,
            "moe_intermediate_size": e.hidden,
            "use_expert_bias": e.correction_bias,
            "routed_scaling_factor": e.routed_scale,
            "norm_topk_prob": e.renormalize,
        }
    return found


def _config(arch: Arch, pairs: list[str]) -> dict[str, Any]:
    c, a = first(arch, "C"), first(arch, "A")
    return {
        **around(arch, "norm_eps"),
        **heads(a, arch.d_model),
        **rope(a),
        "num_hidden_layers": len(pairs),
        "layer_types": [FULL if "A" in pair else "conv" for pair in pairs],
        "conv_L_cache": 3 if c is None else c.d_conv,
        "conv_bias": c is not None and c.conv_bias,
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.embedding_norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'ffn' if node.layer % 2 else 'operator'}_norm")
        if node.slot.letter == "C":
            yield from _convolution(node, f"{there}.conv")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn", out="out_proj", norms=("q_layernorm", "k_layernorm"))
        elif node.slot.letter == "F":
            yield from mlp(node, f"{there}.feed_forward", names=("w1", "w3", "w2"))
        else:
            yield from experts(node, f"{there}.feed_forward", bias="expert_bias")


def _convolution(node: Node, there: str) -> Iterator[Piece]:
    config: Any = node.config
    names = ["in_proj.weight", "conv.weight", "out_proj.weight", *(["conv.bias"] if config.conv_bias else [])]
    names += ["in_proj.bias", "out_proj.bias"] if config.bias else []
    yield from renamed({name: name for name in names}, prefix(node), there)


register(
    Family(
        model_types=("lfm2",),
        class_name="Lfm2ForCausalLM",
        defaults=LFM2,
        arch=lfm2,
        pieces=pieces,
        config=lfm2_config,
        needs_attention=True,
        aliases={"tie_embedding": "tie_word_embeddings", "block_ff_dim": "intermediate_size"},
    )
)
register(
    Family(
        model_types=("lfm2_moe",),
        class_name="Lfm2MoeForCausalLM",
        defaults=LFM2_MOE,
        arch=lfm2_moe,
        pieces=pieces,
        config=lfm2_moe_config,
        needs_attention=True,
        hub=Hub(experts=("w1", "w3", "w2")),
        aliases={"tie_embedding": "tie_word_embeddings"},
    )
)
