"""Nemotron-H: one sub-layer a layer, of Mamba-2, attention, MLP or experts, in any order.

transformers clamps Mamba-2's step sizes from below to ``time_step_min`` when it reads a prompt, but not when it decodes
from a cache; vLLM, MLX and llama.cpp never do, and neither do we. Where a step falls below, transformers disagrees with
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, SIGMOID, layered
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import Piece, attention, experts, feed_forward, mamba2, norm, prefix, surroundings

DEFAULTS = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "layers_block_type": None,
    "tie_word_embeddings": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 21504,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 128,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "n_routed_experts": 8,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "moe_latent_size": None,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
}
LETTERS = {LINEAR: "N", FULL: "A", "mlp": "F", "moe": "E"}
_MEGATRON = {"M": LINEAR, "*": FULL, "-": "mlp", "E": "moe"}  # letters of hybrid_override_pattern


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    config.silu("mamba_hidden_act")
    types = _types(config)
    feed: dict[str, Any] = {"activation": config.activation("mlp_hidden_act"), "gated": False}
    if "moe" in types:
        config.need(None, moe_latent_size="and our experts read the residual stream itself")
        config.need(False, mlp_bias="and our experts have biases in all matrices or in none")
    return layered(
        (LETTERS[kind] for kind in types),
        **config.model("layer_norm_epsilon"),
        N={
            "d_inner": config["mamba_num_heads"] * config["mamba_head_dim"],
            "head_dim": config["mamba_head_dim"],
            "d_state": config["ssm_state_size"],
            "d_conv": config["conv_kernel"],
            "n_groups": config["n_groups"],
            "conv_bias": config["use_conv_bias"],
            "bias": config["use_bias"],
            "norm_eps": config["layer_norm_epsilon"],
        },
        A={**config.heads(), "positions": "none"},
        F={**feed, "d_ff": config["intermediate_size"], "bias": config["mlp_bias"]},
        E={
            **DROPLESS,
            **SIGMOID,
            **feed,
            "n_experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["moe_intermediate_size"],
            "d_shared": config["moe_shared_expert_intermediate_size"] or config["intermediate_size"],
            "routed_scale": float(config["routed_scaling_factor"]),
            "expert_groups": config["n_group"],
            "top_groups": config["topk_group"],
            "renormalize": config["norm_topk_prob"],
        },
    )


def _types(config: Settings) -> list[str]:
    if config["layers_block_type"] is not None:
        return config.layer_types(name="layers_block_type", own=("mlp", "moe"))
    letters = config.given("hybrid_override_pattern", "ME*-")
    for letter in letters:
        if letter not in _MEGATRON:
            raise config.refusal("hybrid_override_pattern", tuple(_MEGATRON), got=letter)
    return [_MEGATRON[letter] for letter in letters]


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embeddings", "model.norm_f")
    for node in arch.nodes:
        there = f"model.layers.{node.layer}"
        yield norm(node, f"{there}.norm")
        if node.slot.letter == "N":
            yield from mamba2(node, f"{there}.mixer")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.mixer")
        elif node.slot.letter == "E":
            yield from experts(node, f"{there}.mixer", shared="shared_experts")
        else:
            own: Any = node.config
            yield from feed_forward(f"{prefix(node)}.ff", f"{there}.mixer", own.hidden, gated=False, bias=own.bias)


register(
    Family(
        model_types=("nemotron_h",),
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        aliases={
            "layer_types": "layers_block_type",
            "num_local_experts": "n_routed_experts",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_conv_bias": "use_conv_bias",
        },
        renames=((r"^backbone\.", "model."), (r"^model\.embedding\.", "model.embeddings.")),
        unused=(r"mtp\b",),  # heads for several tokens ahead
    )
)
