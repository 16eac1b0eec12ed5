"""Zamba2: Mamba-2 layers, and shared attention on [x, embedding] in front of some of them; read, and not written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.presets import layered
from hybridnas.errors import ConfigError
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Piece, mamba2, norm, prefix, renamed, stacked, surroundings

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 2560,
    "num_hidden_layers": 54,
    "layers_block_type": [
        *["linear_attention"],
        *[*["linear_attention"] * 5, "hybrid"] * 7,
        *[*["linear_attention"] * 4, "hybrid", *["linear_attention"] * 3, "hybrid", *["linear_attention"] * 2],
    ],
    "mamba_d_state": 64,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "use_conv_bias": True,
    "add_bias_linear": False,
    "intermediate_size": None,
    "hidden_act": "gelu",
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": False,
    "adapter_rank": 128,
    "use_mem_rope": False,
    "use_long_context": False,
    "rope_parameters": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
_GATED_EPS = 1e-5  # of the norm in Mamba-2, which the class writes out


def arch(config: Settings) -> Arch:
    """Return the architecture; raises ConfigError for biases and for positions that are scaled to long contexts."""
    config.need(
        False, add_bias_linear="and our block has no biases", use_long_context="and we have no scaled positions"
    )
    width, count = config["hidden_size"], config["num_hidden_layers"]
    types = config.layer_types(count, name="layers_block_type", own=("hybrid",))
    inner = int(config["mamba_expand"] * width)
    rank = config["adapter_rank"]
    places = [i for i, kind in enumerate(types) if kind == "hybrid"]
    names = {place: f"z{turn % config['num_mem_blocks']}" for turn, place in enumerate(places)}
    heads = config["num_attention_heads"]
    return layered(
        (f"[Z@{names[i]}N]" if i in names else "N" for i in range(count)),
        **config.model(),
        N={
            "d_inner": inner,
            "head_dim": inner // config["n_mamba_heads"],
            "d_state": config["mamba_d_state"],
            "d_conv": config["mamba_d_conv"],
            "n_groups": config["mamba_ngroups"],
            "conv_bias": config["use_conv_bias"],
            "norm_eps": _GATED_EPS,
        },
        Z={
            "n_heads": heads,
            "n_kv_heads": config.given("num_key_value_heads") or heads,
            "head_dim": 2 * width // heads,
            "d_ff": config.given("intermediate_size") or 4 * width,
            "activation": config.activation(),
            "positions": "rope" if config["use_mem_rope"] else "none",
            **(config.rope() if config["use_mem_rope"] else {}),
            "mlp_rank": rank,
            "attention_rank": rank if config["use_shared_attention_adapter"] else 0,
            "norm_eps": config["rms_norm_eps"],
            "skip": True,
            "norm_position": "post",
        },
    )


def config(arch: Arch) -> dict[str, Any]:
    """Raise ConfigError: no search space yields shared blocks in branches, so that there is nothing to write."""
    raise ConfigError(
        "Zamba2 is read and not written, since its shared blocks and their adapters have no part in a search",
        field="format",
        got="zamba2",
        allowed="a format that is written",
    )


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.final_layernorm")
    first: dict[str, Node] = {}
    hybrid = [node.layer for node in arch.nodes if node.slot.letter == "Z"]
    for node in arch.nodes:
        there = f"model.layers.{node.layer}"
        if node.slot.letter == "Z":
            yield norm(node, f"{there}.mamba_decoder.input_layernorm")
            shared = first.setdefault(node.module, node)
            block = f"model.layers.{shared.layer}.shared_transformer"
            if shared is node:
                yield from _shared(node, block)
            yield from _own(node, there, block, hybrid.index(node.layer), first=shared is node)
        elif node.layer in hybrid:
            yield from mamba2(node, f"{there}.mamba_decoder.mamba")
        else:
            yield norm(node, f"{there}.input_layernorm")
            yield from mamba2(node, f"{there}.mamba")


def _shared(node: Node, there: str) -> Iterator[Piece]:
    ours, columns = prefix(node), node.config.columns  # type: ignore[attr-defined]
    parts = zip(("q", "k", "v"), columns, strict=True)
    yield from stacked(f"{ours}.qkv_proj.weight", [(f"{there}.self_attn.{name}_proj.weight", n) for name, n in parts])
    names = {
        "norm": "input_layernorm",
        "ff_norm": "pre_ff_layernorm",
        "out_proj": "self_attn.o_proj",
        "up_proj": "feed_forward.gate_up_proj",
        "down_proj": "feed_forward.down_proj",
    }
    yield from renamed({f"{own}.weight": f"{other}.weight" for own, other in names.items()}, ours, there)


def _own(node: Node, there: str, block: str, turn: int, *, first: bool) -> Iterator[Piece]:
    """Yield what one place has for itself: all adapters lie in the shared module there."""
    ours = f"{prefix(node)}.own" if first else f"layers.{node.layer}.own.{node.branch}_{node.position}"
    yield Piece(ours=f"{ours}.linear.weight", theirs=f"{there}.linear.weight")
    adapters = {"up": "feed_forward.gate_up_proj_adapter_list"} if node.config.mlp_rank else {}  # type: ignore[attr-defined]
    if node.config.attention_rank:  # type: ignore[attr-defined]
        adapters |= {f"qkv.{i}": f"self_attn.linear_{name}_adapter_list" for i, name in enumerate("qkv")}
    for own, other in adapters.items():
        for half in (0, 1):
            yield Piece(ours=f"{ours}.{own}.{half}.weight", theirs=f"{block}.{other}.{turn}.{half}.weight")


register(
    Family(
        model_types=("zamba2",),
        class_name="Zamba2ForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        aliases={"layer_types": "layers_block_type"},
        unused=(r"model\.layers\.\d+\.shared_transformer\.",),  # the same tensors under each place's name
        written=False,
    )
)
