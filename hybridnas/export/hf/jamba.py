"""Jamba: Mamba with norms of dt, B and C, attention at a period, MLP and experts at another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DROPLESS, layered
from hybridnas.errors import ConfigError
from hybridnas.export.hf.configs import activation, around, first, heads, layers, places, whole_factor
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, attention, experts, mamba, mlp, norm, surroundings

DEFAULTS = {
    "vocab_size": 65536,
    "tie_word_embeddings": False,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "num_experts_per_tok": 2,
    "num_experts": 16,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": None,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}


def arch(config: Settings) -> Arch:
    """Return the architecture."""
    config.silu()
    rank = config["mamba_dt_rank"]
    feed = {"activation": config.activation(), "gated": True}

    def layer(i: int) -> str:
        attention = i % config["attn_layer_period"] == config["attn_layer_offset"]
        routed = config["num_experts"] > 1 and i % config["expert_layer_period"] == config["expert_layer_offset"]
        return ("A" if attention else "M") + ("E" if routed else "F")

    return layered(
        map(layer, range(config["num_hidden_layers"])),
        **config.model(),
        M={
            "d_state": config["mamba_d_state"],
            "d_conv": config["mamba_d_conv"],
            "d_inner": config["mamba_expand"] * config["hidden_size"],
            "dt_rank": None if rank == "auto" else rank,
            "conv_bias": config["mamba_conv_bias"],
            "bias": config["mamba_proj_bias"],
            "selective_norm": "scaled",
            "selective_norm_eps": config["rms_norm_eps"],
        },
        A={**config.heads(), "positions": "none"},
        F={**feed, "d_ff": config["intermediate_size"], "bias": False},
        E={
            **DROPLESS,
            **feed,
            "n_experts": config["num_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["intermediate_size"],
            "router": "top_k",
            "load_balance_weight": config["router_aux_loss_coef"],
        },
    )


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture; raises ConfigError where attention or experts have no period."""
    pairs = layers(arch, "MA", "FE")
    m, a, f, e = (first(arch, letter) for letter in "MAFE")
    found: dict[str, Any] = {
        **around(arch),
        **heads(a, arch.d_model),
        "num_hidden_layers": len(pairs),
        "intermediate_size": (f or e).hidden,
        "hidden_act": activation(f, e),
        "num_experts": 1,
    }
    found["attn_layer_period"], found["attn_layer_offset"] = _period(places(pairs, "A"), len(pairs), "A")
    found["expert_layer_period"], found["expert_layer_offset"] = _period(places(pairs, "E"), len(pairs), "E")
    if e is not None:
        found |= {"num_experts": e.n_experts, "num_experts_per_tok": e.top_k}
        found["router_aux_loss_coef"] = e.load_balance_weight
    if m is not None:
        found |= {
            "mamba_d_state": m.d_state,
            "mamba_d_conv": m.d_conv,
            "mamba_expand": whole_factor(m),
            "mamba_dt_rank": m.rank,
            "mamba_conv_bias": m.conv_bias,
            "mamba_proj_bias": m.bias,
        }
    return found


def _period(where: Sequence[int], count: int, letter: str) -> tuple[int, int]:
    """Return the period and the offset of the layers that have a letter; one beyond the last layer where none has."""
    for period in range(1, count + 2):
        for offset in range(period):
            if list(range(offset, count, period)) == list(where):
                return period, offset
    raise ConfigError(
        f"layers {', '.join(map(str, where))} of {count} have {letter}, and the class has it at a period alone",
        field="pattern",
        got=tuple(where),
        allowed="layers at equal distances",
    )


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.final_layernorm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'pre_ff' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "M":
            yield from mamba(node, f"{there}.mamba")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        elif node.slot.letter == "F":
            yield from mlp(node, f"{there}.feed_forward")
        else:
            yield from experts(node, f"{there}.feed_forward", router="router")


register(
    Family(
        model_types=("jamba",),
        class_name="JambaForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        needs_attention=True,
        aliases={"num_local_experts": "num_experts"},
    )
)
