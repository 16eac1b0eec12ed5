"""The format of an exported folder: file names, config.json, and the one name under which each tensor is stored."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.model import HybridLM
from hybridnas.plugins import of_module
from hybridnas.registry import BLOCKS

CONFIG, WEIGHTS, CARD, GENERATION = "config.json", "model.safetensors", "README.md", "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Replaced by the next export, or removed by it.
OWN_FILES = (CONFIG, WEIGHTS, INDEX, CARD, GENERATION, *TOKENIZER_FILES)
MODEL_TYPE = "hybridnas"
CLASS = "HybridNASForCausalLM"  # of hybridnas.hf, for programs that look for a class of transformers
LINEAGE = "lineage"  # in config.json: the grafts that led to the model, the oldest first
OWN_KEY = "hybridnas"  # in a config.json of another format: which architecture of ours it is
FORMAT_VERSION = 1  # raised when an older hybridnas could no longer read the folder
COST_SEQ_LEN = 1024  # at which config.json and the model card state FLOPs and state bytes [tokens]

# The words of Hugging Face configs; a letter without one is called by its block's own name.
_LAYER_TYPES = {
    "M": "linear_attention",
    "N": "linear_attention",
    "G": "linear_attention",
    "R": "linear_attention",
    "X": "linear_attention",
    "W": "linear_attention",
    "A": "full_attention",
    "S": "sliding_attention",
    "C": "conv",
    "F": "mlp",
    "E": "moe",
}
# Their names for sizes that all blocks of a letter may share: (letter, our field) -> config.json key.
_SIZES = {
    ("M", "d_state"): "state_size",
    ("M", "d_conv"): "conv_kernel",
    ("M", "expand"): "expand",
    ("A", "n_heads"): "num_attention_heads",
    ("A", "n_kv_heads"): "num_key_value_heads",
    ("A", "head_dim"): "head_dim",
    ("F", "d_ff"): "intermediate_size",
    ("E", "n_experts"): "num_experts",
    ("E", "top_k"): "num_experts_per_tok",
    ("E", "d_expert"): "moe_intermediate_size",
}


def stored_tensors(model: HybridLM) -> dict[str, Tensor]:
    """Return name -> tensor as safetensors keeps them: a tied or shared tensor once, under the first of its names."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def layer_types(arch: Arch) -> list[str]:
    """Return one Hugging Face word per layer; a layer that joins different kinds is ``hybrid``."""
    words = []
    for layer in arch.layers:
        names = {_layer_type(node) for branch in layer for node in branch}
        words.append(names.pop() if len(names) == 1 else "hybrid")
    return words


def _layer_type(node: Node) -> str:
    windowed = getattr(node.config, "window", None) is not None  # letter A too can have one
    letter = "S" if windowed else node.slot.letter
    return _LAYER_TYPES.get(letter, BLOCKS.get(letter).name)


def make_config(
    arch: Arch, facts: Mapping[str, Any], dtype: str, lineage: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Return the content of config.json: the architecture, its identity and cost, how it was trained and grafted."""
    cost = arch.cost(COST_SEQ_LEN)
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "hybridnas_version": _version(),
        "fingerprint": arch.fingerprint(),
        "arch": arch.to_dict(),
        "hybrid_layer_pattern": arch.pattern.letters,
        "hybrid_layer_types": layer_types(arch),  # not layer_types, whose words transformers restricts
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        "num_hidden_layers": len(arch.pattern),
        "tie_word_embeddings": arch.model.tie_embeddings,
        "dtype": dtype,
        **_common_sizes(arch),
        **({"plugins": needed} if (needed := plugins_of(arch)) else {}),
        "cost": {"seq_len": COST_SEQ_LEN, **dataclasses.asdict(cost)},
        "training": plain(facts),
        **({LINEAGE: plain(lineage)} if lineage else {}),
    }


def plugins_of(arch: Arch) -> dict[str, dict[str, str]]:
    """Return letter -> name and SHA-256 of the plugin whose block it is, for letters that no package registers."""
    found = {}
    for letter in sorted({node.slot.letter for node in arch.nodes}):
        plugin = of_module(BLOCKS.get(letter).__module__)
        if plugin is not None:
            found[letter] = {"name": plugin.name, "sha256": plugin.sha256}
    return found


def _version() -> str:
    try:
        return version("hybridnas")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _common_sizes(arch: Arch) -> dict[str, Any]:
    sizes = {}
    for (letter, field), key in _SIZES.items():
        found = {node.config.canonical().get(field) for node in arch.nodes if node.slot.letter == letter}
        if len(found) == 1 and (value := found.pop()) is not None:
            sizes[key] = value
    return sizes


def plain(value: Any) -> Any:
    """Return the value as JSON can hold it: numbers that are not finite become None, other types their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def probe_ids(vocab_size: int) -> Tensor:
    """Return the random ids (2, 64) on which the trained and the reloaded model must agree."""
    return torch.randint(vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))


def home(folder: str | Path) -> Path:
    """Return the folder as an absolute path, with ``~`` and links followed."""
    return Path(folder).expanduser().resolve()
