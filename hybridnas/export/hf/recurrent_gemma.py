"""RecurrentGemma: two RG-LRU layers to one of windowed attention, a gated MLP in each; read, and not written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import layered
from hybridnas.arch.presets.recurrent_gemma import root_of_width
from hybridnas.errors import ConfigError
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, attention, mlp, norm, prefix, renamed, surroundings

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2560,
    "intermediate_size": 7680,
    "num_hidden_layers": 26,
    "num_attention_heads": 10,
    "num_key_value_heads": None,
    "lru_width": None,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": None,
    "partial_rotary_factor": 0.5,
    "block_types": ("recurrent", "recurrent", "attention"),
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_LETTERS = {"recurrent": "R", "attention": "A"}


def arch(config: Settings) -> Arch:
    """Return the architecture; the MLP is half as wide as ``intermediate_size``, as the class builds it."""
    types = list(config["block_types"])
    for kind in types:
        if kind not in _LETTERS:
            raise config.refusal("block_types", tuple(_LETTERS), got=kind)
    width = config["lru_width"] or config["hidden_size"]
    activation = config.activation("hidden_activation")
    return layered(
        (_LETTERS[types[i % len(types)]] + "F" for i in range(config["num_hidden_layers"])),
        **{**config.model(), "norm": "rmsnorm_zero"},
        embedding_multiplier=root_of_width(config["hidden_size"]),
        final_softcap=float(config["logits_soft_cap"]),
        R={
            "d_inner": width,
            "gate_blocks": config["num_attention_heads"],
            "d_conv": config["conv1d_width"],
            "activation": activation,
        },
        A={
            **config.heads(),
            **config.rope(fraction=0.5),
            "window": config["attention_window_size"],
            "qkv_bias": config["attention_bias"],
            "out_bias": True,
        },
        F={"d_ff": config["intermediate_size"] // 2, "activation": activation, "gated": True, "bias": True},
    )


def config(arch: Arch) -> dict[str, Any]:
    """Raise ConfigError: the class keeps its recurrent state in its modules, where no comparison can hand it on."""
    raise ConfigError(
        "RecurrentGemma is read and not written, since its class returns no cache by which a written model could be "
        "checked",
        field="format",
        got="recurrent_gemma",
        allowed="a format that is written",
    )


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.final_norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'channel' if node.layer % 2 else 'temporal'}_pre_norm")
        if node.slot.letter == "R":
            yield from _recurrent(node, f"{there}.temporal_block")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.temporal_block")
        else:
            yield from mlp(node, f"{there}.mlp_block")


def _recurrent(node: Any, there: str) -> Iterator[Piece]:
    names = [
        f"{part}.{kind}" for part in ("linear_x", "linear_y", "linear_out", "conv_1d") for kind in ("weight", "bias")
    ]
    gates = [f"rg_lru.{part}_gate_{kind}" for part in ("input", "recurrent") for kind in ("weight", "bias")]
    yield from renamed({name: name for name in (*names, *gates, "rg_lru.recurrent_param")}, prefix(node), there)


register(
    Family(
        model_types=("recurrent_gemma",),
        class_name="RecurrentGemmaForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        written=False,
        aliases={"sliding_window": "attention_window_size", "_block_types": "block_types"},
    )
)
