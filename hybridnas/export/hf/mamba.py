"""Mamba, Falcon-Mamba and Mamba-2: one mixer in every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.export.hf.configs import around, first, layers, whole_factor
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, mamba, mamba2, norm, surroundings

MAMBA = {
    "vocab_size": 50280,
    "hidden_size": 768,
    "state_size": 16,
    "num_hidden_layers": 32,
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
    "time_step_rank": None,
    "tie_word_embeddings": True,
}
FALCON_MAMBA = {**MAMBA, "mixer_rms_eps": 1e-6}
MAMBA2 = {
    **{key: value for key, value in MAMBA.items() if key != "time_step_rank"},
    "vocab_size": 32768,
    "hidden_size": 4096,
    "state_size": 128,
    "num_hidden_layers": 64,
    "num_heads": 128,
    "head_dim": 64,
    "n_groups": 8,
    "time_step_limit": [0.0, math.inf],
    "tie_word_embeddings": False,
}


def mamba_arch(config: Settings) -> Arch:
    """Return the architecture of a Mamba."""
    return layered(["M"] * config["num_hidden_layers"], **config.model("layer_norm_epsilon"), M=_mixer(config))


def falcon_mamba_arch(config: Settings) -> Arch:
    """Return the architecture of a Falcon-Mamba, whose dt, B and C pass norms without weights."""
    norms = {"selective_norm": "unscaled", "selective_norm_eps": config["mixer_rms_eps"]}
    mixer = {**_mixer(config), **norms}
    return layered(["M"] * config["num_hidden_layers"], **config.model("layer_norm_epsilon"), M=mixer)


def _mixer(config: Settings) -> dict[str, Any]:
    config.silu()
    rank = config["time_step_rank"]
    return {
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        # Falcon-Mamba-7B's config has an expand of 16 beside the width that is built.
        "d_inner": config.given("intermediate_size") or int(config["expand"] * config["hidden_size"]),
        "dt_rank": None if rank == "auto" else rank,
        "conv_bias": config["use_conv_bias"],
        "bias": config["use_bias"],
    }


def mamba2_arch(config: Settings) -> Arch:
    """Return the architecture of a Mamba-2."""
    config.silu()
    config.no_step_limits()
    mixer = {
        "d_state": config["state_size"],
        "d_conv": config["conv_kernel"],
        "d_inner": config["num_heads"] * config["head_dim"],
        "head_dim": config["head_dim"],
        "n_groups": config["n_groups"],
        "conv_bias": config["use_conv_bias"],
        "bias": config["use_bias"],
        "norm_eps": config["layer_norm_epsilon"],
    }
    return layered(["N"] * config["num_hidden_layers"], **config.model("layer_norm_epsilon"), N=mixer)


def mamba_config(arch: Arch) -> dict[str, Any]:
    """Return the config of a Mamba."""
    blocks, m = layers(arch, "M"), first(arch, "M")
    return {
        **around(arch, "layer_norm_epsilon"),
        "num_hidden_layers": len(blocks),
        "state_size": m.d_state,
        "conv_kernel": m.d_conv,
        "expand": whole_factor(m),
        "intermediate_size": m.width,
        "time_step_rank": m.rank,
        "use_conv_bias": m.conv_bias,
        "use_bias": m.bias,
    }


def falcon_mamba_config(arch: Arch) -> dict[str, Any]:
    """Return the config of a Falcon-Mamba."""
    return {**mamba_config(arch), "mixer_rms_eps": first(arch, "M").selective_norm_eps}


def mamba2_config(arch: Arch) -> dict[str, Any]:
    """Return the config of a Mamba-2."""
    blocks, n = layers(arch, "N"), first(arch, "N")
    return {
        **around(arch, "layer_norm_epsilon"),
        "num_hidden_layers": len(blocks),
        "num_heads": n.heads,
        "head_dim": n.head_width,
        "n_groups": n.n_groups,
        "state_size": n.d_state,
        "conv_kernel": n.d_conv,
        "expand": whole_factor(n),
        "use_conv_bias": n.conv_bias,
        "use_bias": n.bias,
    }


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "backbone.embeddings", "backbone.norm_f")
    for node in arch.nodes:
        there = f"backbone.layers.{node.layer}"
        yield norm(node, f"{there}.norm")
        yield from (mamba if node.slot.letter == "M" else mamba2)(node, f"{there}.mixer")


# The first checkpoints of Mamba call the embedding in the singular, as transformers itself does not.
RENAMES = ((r"^backbone\.embedding\.", "backbone.embeddings."),)
for name, class_name, defaults, read, write in (
    ("mamba", "MambaForCausalLM", MAMBA, mamba_arch, mamba_config),
    ("falcon_mamba", "FalconMambaForCausalLM", FALCON_MAMBA, falcon_mamba_arch, falcon_mamba_config),
    ("mamba2", "Mamba2ForCausalLM", MAMBA2, mamba2_arch, mamba2_config),
):
    register(
        Family(
            model_types=(name,),
            class_name=class_name,
            defaults=defaults,
            arch=read,
            pieces=pieces,
            config=write,
            renames=RENAMES,
        )
    )
