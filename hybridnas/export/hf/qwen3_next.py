"""Qwen3-Next and the language models of Qwen3.5: Gated DeltaNet and gated attention, an MLP or experts after each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.presets import DROPLESS, layered
from hybridnas.export.hf.configs import activation, around, first, gated_delta, heads, layers, places, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import (
    Piece,
    attention,
    experts,
    mlp,
    norm,
    prefix,
    renamed,
    stacked,
    surroundings,
)

_SHARED = {
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "layer_types": None,
}
_EXPERTS = {
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "router_aux_loss_coef": 0.001,
}
QWEN3_NEXT = {
    **_SHARED,
    **_EXPERTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 48,
    "decoder_sparse_step": 1,
    "num_experts_per_tok": 10,
    "num_experts": 512,
    "norm_topk_prob": True,
    "mlp_only_layers": None,
}
QWEN3_5 = {
    **_SHARED,
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
}
QWEN3_5_MOE = {
    **_SHARED,
    **_EXPERTS,
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}


def qwen3_next(config: Settings) -> Arch:
    """Return the architecture; single layers may have an MLP in place of experts."""
    dense = config["mlp_only_layers"] or ()
    sparse = config["decoder_sparse_step"]
    routed = [i not in dense and config["num_experts"] > 0 and (i + 1) % sparse == 0 for i in range(_layers(config))]
    feed = ["E" if one else "F" for one in routed]
    return _arch(config, feed, d_ff=config["intermediate_size"], renormalize=config["norm_topk_prob"])


def qwen3_5(config: Settings) -> Arch:
    """Return the architecture, with an MLP in every layer."""
    return _arch(config, ["F"] * _layers(config), d_ff=config["intermediate_size"])


def qwen3_5_moe(config: Settings) -> Arch:
    """Return the architecture, with experts in every layer."""
    return _arch(config, ["E"] * _layers(config))


def _layers(config: Settings) -> int:
    count: int = config["num_hidden_layers"]
    return count


def _arch(config: Settings, feed: list[str], *, d_ff: int | None = None, renormalize: bool = True) -> Arch:
    config.silu()
    count = _layers(config)
    if config["layer_types"] is None:
        period = config.given("full_attention_interval", 4)
        types = [LINEAR if (i + 1) % period else FULL for i in range(count)]
    else:
        types = config.layer_types(count)
    shape = {"activation": config.activation(), "gated": True}
    routed: dict[str, Any] = {}
    if "E" in feed:
        routed = {
            **DROPLESS,
            **shape,
            "n_experts": config["num_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["moe_intermediate_size"],
            "d_shared": config["shared_expert_intermediate_size"],
            "shared_gate": True,
            "router": "top_k",
            "renormalize": renormalize,
            "load_balance_weight": config["router_aux_loss_coef"],
        }
    return layered(
        (("A" if kind == FULL else "G") + own for kind, own in zip(types, feed, strict=True)),
        **{**config.model(), "norm": "rmsnorm_zero"},
        G={
            "n_heads": config["linear_num_key_heads"],
            "n_value_heads": config["linear_num_value_heads"],
            "head_dim": config["linear_key_head_dim"],
            "value_head_dim": config["linear_value_head_dim"],
            "d_conv": config["linear_conv_kernel_dim"],
            "norm_eps": config["rms_norm_eps"],
        },
        A={
            **config.heads(),
            **config.rope(fraction=0.25),
            "gate": "elementwise",
            "qk_norm": "head",
            "qk_norm_zero_centered": True,
            "norm_eps": config["rms_norm_eps"],
            "bias": config["attention_bias"],
        },
        F={**shape, "d_ff": d_ff, "bias": False},
        E=routed,
    )


def qwen3_next_config(arch: Arch) -> dict[str, Any]:
    """Return the config of Qwen3-Next."""
    pairs = layers(arch, "GA", "FE")
    f, e = first(arch, "F"), first(arch, "E")
    found = {
        **_config(arch, pairs),
        "intermediate_size": (f or e).hidden,
        "mlp_only_layers": places(pairs, "F"),
        "decoder_sparse_step": 1,
    }
    return {**found, "norm_topk_prob": e.renormalize} if e is not None else {**found, "num_experts": 0}


def qwen3_5_config(arch: Arch) -> dict[str, Any]:
    """Return the config of Qwen3.5, which has an MLP in every layer."""
    return {**_config(arch, layers(arch, "GA", "F")), "intermediate_size": first(arch, "F").hidden}


def qwen3_5_moe_config(arch: Arch) -> dict[str, Any]:
    """Return the config of Qwen3.5-MoE, which has experts in every layer."""
    return _config(arch, layers(arch, "GA", "E"))


def _config(arch: Arch, pairs: list[str]) -> dict[str, Any]:
    g, a, f, e = (first(arch, letter) for letter in "GAFE")
    found: dict[str, Any] = {
        **around(arch),
        **heads(a, arch.d_model, always=True),
        **rope(a, fraction=True),
        "num_hidden_layers": len(pairs),
        "layer_types": [FULL if "A" in pair else LINEAR for pair in pairs],
        "hidden_act": activation(f, e),
        "attention_bias": a is not None and a.biases[0],
    }
    if g is not None:
        found |= gated_delta(g)
    if e is not None:
        found |= {
            "num_experts": e.n_experts,
            "num_experts_per_tok": e.top_k,
            "moe_intermediate_size": e.hidden,
            "shared_expert_intermediate_size": e.d_shared or 1,
            "router_aux_loss_coef": e.load_balance_weight,
        }
    return found


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'post_attention' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "G":
            next_layout = config.model_type == "qwen3_next"
            yield from (_by_key_head if next_layout else _by_part)(node, f"{there}.linear_attn")
            names = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
            yield from renamed({name: name for name in names}, prefix(node), f"{there}.linear_attn")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        elif node.slot.letter == "F":
            yield from mlp(node, f"{there}.mlp")
        else:
            yield from experts(node, f"{there}.mlp", shared="shared_expert")
            gate = {"shared_gate.weight": "shared_expert_gate.weight"}
            yield from renamed(gate, prefix(node), f"{there}.mlp")


def _by_key_head(node: Node, there: str) -> Iterator[Piece]:
    """Yield ``in_proj`` of Qwen3-Next, whose rows lie key head by key head: q, k, v, z, and in a second matrix b, a."""
    config: Any = node.config
    ours, heads, share = f"{prefix(node)}.in_proj.weight", config.heads, config.value_heads // config.heads
    sizes = [config.key_dim, config.key_dim, share * config.value_dim, share * config.value_dim]
    start = 0
    for name, parts, order in (("in_proj_qkvz", sizes, (0, 1, 2, 3)), ("in_proj_ba", [share, share], (1, 0))):
        rows = torch.split(torch.arange(heads * sum(parts)).view(heads, -1), parts, dim=1)
        for which in order:
            size = heads * parts[which]
            at = slice(start, start + size)
            yield Piece(ours=ours, theirs=f"{there}.{name}.weight", at=at, rows=rows[which].flatten())
            start += size


def _by_part(node: Node, there: str) -> Iterator[Piece]:
    """Yield ``in_proj`` of Qwen3.5, which is four matrices there."""
    shape = _shape(node)
    sizes = {"qkv": shape.mixed, "z": shape.inner, "a": shape.value_heads, "b": shape.value_heads}
    parts = [(f"{there}.in_proj_{name}.weight", size) for name, size in sizes.items()]
    yield from stacked(f"{prefix(node)}.in_proj.weight", parts)


def _shape(node: Node) -> Any:
    config: Any = node.config
    return config.shape


_LANGUAGE_MODEL = ((r"^model\.language_model\.", "model."),)
_HEADS_AHEAD = r"mtp\b"
_VISION = r"model\.visual\."
register(
    Family(
        model_types=("qwen3_next",),
        class_name="Qwen3NextForCausalLM",
        defaults=QWEN3_NEXT,
        arch=qwen3_next,
        pieces=pieces,
        config=qwen3_next_config,
        needs_attention=True,
        unused=(_HEADS_AHEAD,),
    )
)
for types, class_name, defaults, arch, config in (
    (("qwen3_5_text", "qwen3_5"), "Qwen3_5ForCausalLM", QWEN3_5, qwen3_5, qwen3_5_config),
    (("qwen3_5_moe_text", "qwen3_5_moe"), "Qwen3_5MoeForCausalLM", QWEN3_5_MOE, qwen3_5_moe, qwen3_5_moe_config),
):
    register(
        Family(
            model_types=types,
            class_name=class_name,
            defaults=defaults,
            arch=arch,
            pieces=pieces,
            config=config,
            needs_attention=True,
            renames=_LANGUAGE_MODEL,
            unused=(_HEADS_AHEAD, _VISION),
        )
    )
