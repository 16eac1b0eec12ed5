"""xLSTM: mLSTM layers with a gated MLP in each; read, and not written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import SWIGLU, repeated
from hybridnas.errors import ConfigError
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, mlp, norm, prefix, renamed, stacked, surroundings

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "embedding_dim": None,
    "num_hidden_layers": 32,
    "num_blocks": None,
    "num_heads": 8,
    "use_bias": False,
    "tie_word_embeddings": False,
    "norm_eps": 1e-6,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "eps": 1e-6,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
    "weight_mode": "single",
}


def arch(config: Settings) -> Arch:
    """Return the architecture; raises ConfigError for biases and for weights that are stored together."""
    config.need(False, use_bias="and our norms have no biases")
    config.need("single", weight_mode="and their fused weights are not read")
    width, heads = config["hidden_size"], config["num_heads"]
    if config.given("embedding_dim") not in (None, width):
        raise config.refusal("embedding_dim", (width,))
    if config.given("num_blocks") not in (None, config["num_hidden_layers"]):
        raise config.refusal("num_blocks", (config["num_hidden_layers"],))
    multiple = config["ffn_round_up_to_multiple_of"]
    d_ff = int((width * config["ffn_proj_factor"] + multiple - 1) // multiple * multiple)
    return repeated(
        "XF",
        config["num_hidden_layers"],
        **config.model("norm_eps"),
        final_softcap=float(config["output_logit_soft_cap"]),
        X={
            "n_heads": heads,
            "d_inner": int(width * config["v_dim_factor"]),
            "head_dim": int(width * config["qk_dim_factor"]) // heads,
            "gate_softcap": float(config["gate_soft_cap"]),
            "norm_eps": config["norm_eps"],
            "denominator_eps": config["eps"],
        },
        F={**SWIGLU, "d_ff": d_ff},
    )


def config(arch: Arch) -> dict[str, Any]:
    """Raise ConfigError: the class rounds to bfloat16 from 64 tokens on, by which no written model could be checked."""
    raise ConfigError(
        "xLSTM is read and not written, since its class computes chunks of 64 tokens in bfloat16, by which a written "
        "model could not be checked",
        field="format",
        got="xlstm",
        allowed="a format that is written",
    )


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "backbone.embeddings", "backbone.out_norm")
    for node in arch.nodes:
        there = f"backbone.blocks.{node.layer // 2}"
        yield norm(node, f"{there}.{'norm_ffn' if node.layer % 2 else 'norm_mlstm'}")
        if node.layer % 2:
            yield from mlp(node, f"{there}.ffn", names=("proj_up_gate", "proj_up", "proj_down"))
        else:
            yield from _mlstm(node, f"{there}.mlstm_layer")


def _mlstm(node: Any, there: str) -> Iterator[Piece]:
    ours, heads = prefix(node), node.config.heads
    parts = zip(("q", "k", "v", "ogate_preact"), node.config.columns, strict=True)
    yield from stacked(f"{ours}.in_proj.weight", [(f"{there}.{name}.weight", size) for name, size in parts])
    for kind in ("weight", "bias"):
        gates = [(f"{there}.{name}_preact.{kind}", heads) for name in ("igate", "fgate")]
        yield from stacked(f"{ours}.gates.{kind}", gates)
    yield from renamed({"norm.weight": "multihead_norm.weight", "out_proj.weight": "out_proj.weight"}, ours, there)


register(
    Family(
        model_types=("xlstm",),
        class_name="xLSTMForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        written=False,
    )
)
