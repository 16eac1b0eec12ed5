"""OLMo-Hybrid: Gated DeltaNet layers with norms before, attention layers with norms after, an MLP in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.export.hf.configs import activation, around, first, gated_delta, heads, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, mlp, norm, prefix, renamed, stacked, surroundings

DEFAULTS = {
    "vocab_size": 100352,
    "hidden_size": 3840,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "layer_types": None,
    "linear_num_key_heads": None,
    "linear_num_value_heads": None,
    "linear_key_head_dim": None,
    "linear_value_head_dim": None,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
}
_DELTA_NORM_EPS = 1e-5  # of the class, whatever the config says


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    config.silu()
    heads = config["num_attention_heads"]
    key_heads = config["linear_num_key_heads"] or heads
    key_dim = config["linear_key_head_dim"] or int(0.75 * config["hidden_size"] / key_heads)
    return layered(
        ("AF{norm_position=post}" if kind == FULL else "GF" for kind in _types(config)),
        **config.model(),
        G={
            "n_heads": key_heads,
            "n_value_heads": config["linear_num_value_heads"] or heads,
            "head_dim": key_dim,
            "value_head_dim": config["linear_value_head_dim"] or 2 * key_dim,
            "d_conv": config["linear_conv_kernel_dim"],
            "negative_eigenvalues": config["linear_allow_neg_eigval"],
            "norm_eps": _DELTA_NORM_EPS,
        },
        A={
            **config.heads(),
            **_positions(config),
            "qk_norm": "all",
            "norm_eps": config["rms_norm_eps"],
            "bias": config["attention_bias"],
            "norm_position": "post",
        },
        F={"d_ff": config["intermediate_size"], "activation": config.activation(), "gated": True, "bias": False},
    )


def _types(config: Settings) -> list[str]:
    count = config["num_hidden_layers"]
    if config["layer_types"] is not None:
        return config.layer_types(count)
    types = [FULL if i % 4 == 3 else LINEAR for i in range(count)]
    return types if FULL in types else [*types[:-1], FULL]


def _positions(config: Settings) -> dict[str, Any]:
    """Return fields of positions; a base of none, as in the released config, is attention without any."""
    parameters = config.given("rope_parameters") or {}
    if parameters.get("rope_theta", config.given("rope_theta", 10000.0)) is None:
        return {"positions": "none"}
    return config.rope()


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture."""
    pairs = layers(arch, "GA", "F")
    g, a, f = (first(arch, letter) for letter in "GAF")
    found: dict[str, Any] = {
        **around(arch),
        **heads(a, arch.d_model),
        **rope(a),
        "num_hidden_layers": len(pairs),
        "layer_types": [FULL if "A" in pair else LINEAR for pair in pairs],
        "intermediate_size": f.hidden,
        "hidden_act": activation(f),
        "attention_bias": a is not None and a.biases[0],
    }
    if a is not None and a.positions == "none":
        found |= {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": None}
    if g is not None:
        found |= {**gated_delta(g), "linear_allow_neg_eigval": g.negative_eigenvalues}
    return found


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        before = ("input_layernorm", "post_attention_layernorm")
        after = ("post_attention_layernorm", "post_feedforward_layernorm")
        yield norm(node, f"{there}.{(after if node.norm_after else before)[node.layer % 2]}")
        if node.slot.letter == "G":
            yield from _deltanet(node, f"{there}.linear_attn")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        else:
            yield from mlp(node, f"{there}.mlp")


def _deltanet(node: Any, there: str) -> Iterator[Piece]:
    shape, ours = node.config.shape, prefix(node)
    keys = shape.key_heads * shape.key_dim
    sizes = (keys, keys, shape.inner, shape.inner, shape.value_heads, shape.value_heads)
    parts = [(f"{there}.{name}_proj.weight", size) for name, size in zip("qkvgab", sizes, strict=True)]
    yield from stacked(f"{ours}.in_proj.weight", parts)
    names = {"norm.weight": "o_norm.weight", "out_proj.weight": "o_proj.weight"}
    yield from renamed({**names, **{n: n for n in ("conv1d.weight", "A_log", "dt_bias")}}, ours, there)


register(
    Family(
        model_types=("olmo_hybrid",),
        class_name="OlmoHybridForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        hub=Hub(split_convolutions=True),
        renames=(
            (r"\.attention_layer_norm\.", ".input_layernorm."),
            (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
        ),
    )
)
