"""MiniMax-Text-01: lightning attention and softmax attention, experts after each, on a normed residual stream.

MiniMax's own config (``minimax_text_01``) names things in another way than transformers' (``minimax``), and turns
``rotary_dim`` channels of a head. transformers' class turns whole heads; where a config gives ``rotary_dim``, it is
followed, since the weights were trained so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.presets import DROPLESS, layered
from hybridnas.export.hf.configs import activation, around, first, heads, layers, rope
from hybridnas.export.hf.family import Family, register
from hybridnas.export.hf.settings import FULL, LINEAR, Settings
from hybridnas.export.hf.weights import Hub, Piece, attention, experts, norm, prefix, renamed, surroundings

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "router_aux_loss_coef": 0.001,
    "rope_parameters": None,
    "layer_types": None,
    "full_attn_alpha_factor": 1.0,
    "full_attn_beta_factor": 1.0,
    "linear_attn_alpha_factor": 1.0,
    "linear_attn_beta_factor": 1.0,
    "mlp_alpha_factor": 1.0,
    "mlp_beta_factor": 1.0,
}


def arch(config: Settings) -> Arch:
    """Return the architecture; every lightning layer has its own factor of the decays."""
    config.silu()
    count = config["num_hidden_layers"]
    types = [LINEAR if i % 2 else FULL for i in range(count)]
    if config["layer_types"] is not None:
        types = config.layer_types(count)
    elif (numbers := config.given("attn_type_list")) is not None:
        types = [FULL if number else LINEAR for number in numbers]
    if config.given("postnorm", True) is not True:
        raise config.refusal("postnorm", (True,), got=False, why="and no release has it")
    heads = config.heads()
    rotary = config.given("rotary_dim") or heads["head_dim"]

    def around(kind: str) -> dict[str, Any]:
        alpha, beta = (float(config[f"{kind}_{name}_factor"]) for name in ("alpha", "beta"))
        return {"stream_multiplier": alpha, "out_multiplier": beta}

    def mixer(layer: int) -> str:
        return "A" if types[layer] == FULL else f"L{{decay_factor={decay_factor(layer, count):.9g}}}"

    return layered(
        (mixer(i) + "E" for i in range(count)),
        **config.model(),
        norm_position="stream",
        L={
            "kind": "lightning",
            "n_heads": heads["n_heads"],
            "head_dim": heads["head_dim"],
            "value_head_dim": heads["head_dim"],
            "norm_eps": 1e-6,  # of the class, whatever the config says
            **around("linear_attn"),
        },
        A={
            **heads,
            **config.rope(1e6),
            "rotary_fraction": rotary / heads["head_dim"],
            "window": config["sliding_window"],
            **around("full_attn"),
        },
        E={
            **DROPLESS,
            "n_experts": config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "d_expert": config["intermediate_size"],
            "activation": config.activation(),
            "gated": True,
            "router": "top_k",
            "renormalize": True,
            "load_balance_weight": config["router_aux_loss_coef"],
            **around("mlp"),
        },
    )


def decay_factor(layer: int, layers: int) -> float:
    """Return what a layer's decays are multiplied by: the deeper, the slower."""
    return 1 - layer / (layers - 1 + 1e-5) + 1e-5


def config(arch: Arch) -> dict[str, Any]:
    """Return the config nearest to an architecture."""
    pairs = layers(arch, "LA", "E")
    lightning, a, e = (first(arch, letter) for letter in "LAE")
    found: dict[str, Any] = {
        **around(arch),
        **heads(a, arch.d_model, always=True),
        **rope(a),
        "num_hidden_layers": len(pairs),
        "layer_types": [FULL if "A" in pair else LINEAR for pair in pairs],
        "intermediate_size": e.hidden,
        "hidden_act": activation(e),
        "sliding_window": None if a is None else a.window,
        "num_local_experts": e.n_experts,
        "num_experts_per_tok": e.top_k,
        "router_aux_loss_coef": e.load_balance_weight,
    }
    if a is None:
        found |= {"num_attention_heads": lightning.heads, "num_key_value_heads": lightning.heads}
        found["head_dim"] = lightning.key_dim
    for kind, own in (("full_attn", a), ("linear_attn", lightning), ("mlp", e)):
        if own is not None:
            found |= {f"{kind}_alpha_factor": own.stream_multiplier, f"{kind}_beta_factor": own.out_multiplier}
    return found


def pieces(config: Settings, arch: Arch) -> Iterator[Piece]:
    """Yield which tensor holds what."""
    yield from surroundings(arch, "model.embed_tokens", "model.norm")
    for node in arch.nodes:
        there = f"model.layers.{node.layer // 2}"
        yield norm(node, f"{there}.{'post_attention' if node.layer % 2 else 'input'}_layernorm")
        if node.slot.letter == "L":
            yield from _lightning(node, f"{there}.self_attn")
        elif node.slot.letter == "A":
            yield from attention(node, f"{there}.self_attn")
        else:
            yield from experts(node, f"{there}.mlp")


def _lightning(node: Node, there: str) -> Iterator[Piece]:
    """Yield lightning attention, whose queries, keys and values lie head by head there."""
    config: Any = node.config
    ours, width = prefix(node), config.heads * config.key_dim
    rows = torch.arange(3 * width).view(config.heads, 3, config.key_dim)
    for i in range(3):
        at = slice(i * width, (i + 1) * width)
        theirs = f"{there}.qkv_proj.weight"
        yield Piece(ours=f"{ours}.in_proj.weight", theirs=theirs, at=at, rows=rows[:, i].flatten())
    gate = f"{there}.output_gate.weight"
    yield Piece(ours=f"{ours}.in_proj.weight", theirs=gate, at=slice(3 * width, None))
    yield from renamed({name: name for name in ("norm.weight", "out_proj.weight")}, ours, there)


_FACTORS = {"full_attention": "full_attn", "linear_attention": "linear_attn", "mlp": "mlp"}
register(
    Family(
        model_types=("minimax", "minimax_text_01"),
        class_name="MiniMaxForCausalLM",
        defaults=DEFAULTS,
        arch=arch,
        pieces=pieces,
        config=config,
        aliases={
            "num_experts": "num_local_experts",
            **{f"layernorm_{a}_{x}": f"{b}_{x}_factor" for a, b in _FACTORS.items() for x in ("alpha", "beta")},
        },
        renames=((r"\.block_sparse_moe\.", ".mlp."),),
        hub=Hub(renames=((r"\.mlp\.", ".block_sparse_moe."),), experts=("w1", "w3", "w2")),
        unused=(r".*\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)",),  # follow from the config
    )
)
