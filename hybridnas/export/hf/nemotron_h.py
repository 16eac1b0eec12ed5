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
from hybridnas.export.hf.configs import activation, around, first, heads, layers
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, experts, feed_forward, mamba2, norm, prefix, surroundings

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


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture; experts without a shared one get one of a channel, of zeros.

    Layers are named in both ways that servers read, and so is the epsilon of the norms. ``time_step_min`` is next to
    zero, so that no step falls below it.
    """
    letters = layers(arch, "NAFE")
    n, a, f, e = (first(arch, letter) for letter in "NAFE")
    kinds, signs = ({v: k for k, v in names.items()} for names in (LETTERS, _MEGATRON))
    found: dict[str, Any] = {
        **around(arch, "layer_norm_epsilon"),
        "rms_norm_eps": arch.model.norm_eps,
        **heads(a, arch.d_model, always=True),
        "num_hidden_layers": len(letters),
        "layers_block_type": [kinds[letter] for letter in letters],
        "hybrid_override_pattern": "".join(signs[kinds[letter]] for letter in letters),
        "mlp_hidden_act": "relu2" if f is None and e is None else activation(f, e),
        "mlp_bias": f is not None and f.bias,
        "intermediate_size": (f or e).hidden if f or e else 4 * arch.d_model,
        "time_step_min": 1e-12,
    }
    if n is not None:
        found |= {
            "mamba_num_heads": n.heads,
            "mamba_head_dim": n.head_width,
            "ssm_state_size": n.d_state,
            "n_groups": n.n_groups,
            "conv_kernel": n.d_conv,
            "expand": max(1, n.width // n.d_model),
            "use_conv_bias": n.conv_bias,
            "use_bias": n.bias,
            "mamba_proj_bias": n.bias,
        }
    if e is not None:
        found |= {
            "n_routed_experts": e.n_experts,
            "n_shared_experts": 1,
            "num_experts_per_tok": e.top_k,
            "moe_intermediate_size": e.hidden,
            "moe_shared_expert_intermediate_size": e.d_shared or 1,
            "norm_topk_prob": e.renormalize,
            "routed_scaling_factor": e.routed_scale,
            "n_group": e.expert_groups,
            "topk_group": e.top_groups,
        }
    return found


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
        class_name="NemotronHForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        aliases={
            "layer_types": "layers_block_type",
            "num_local_experts": "n_routed_experts",
            "mamba_n_groups": "n_groups",
            "mamba_d_conv": "conv_kernel",
            "mamba_conv_bias": "use_conv_bias",
        },
        renames=((r"^backbone\.", "model."), (r"^model\.embedding\.", "model.embeddings.")),
        style={key: {"activation": "relu2", "gated": False, "bias": False} for key in "FE"},
        hub=Hub(renames=((r"^model\.", "backbone."),)),
        unused=(r"mtp\b",),  # heads for several tokens ahead
    )
)
