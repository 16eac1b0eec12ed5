"""Parts of a transformers config made from an architecture, which the families share.

A family's ``config`` gives the config *nearest* to an architecture: it reads the sizes of the first block of a letter
and never asks whether the others have them too. Read back, that config is an architecture that the class has; what
differs from the one that was asked for is what the class cannot express (``hybridnas.export.hf.fitting``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.errors import ConfigError
from hybridnas.export.hf.settings import ACTIVATIONS
from hybridnas.registry import BLOCKS

_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}  # the first name of each


def kind(node: Node) -> str:
    """Return the letter of a node's block: A for S, which is A with a window."""
    return BLOCKS.get(node.slot.letter).same_as or node.slot.letter


def layers(arch: Arch, *allowed: str) -> list[str]:
    """Return the letters of a class's layers, each of ``len(allowed)`` sub-layers with the given letters.

    Raises ConfigError for the first sub-layer that is another, parallel, or shares its weights.
    """
    found = []
    for index, layer in enumerate(arch.layers):
        nodes = [node for branch in layer for node in branch]
        letters, fits = kind(nodes[0]), allowed[index % len(allowed)]
        if len(nodes) > 1 or letters not in fits or nodes[0].slot.share:
            raise _misplaced(arch, index, " or ".join(fits))
        found.append(letters)
    if len(found) % len(allowed):
        raise _misplaced(arch, len(found) - 1, f"the first of {len(allowed)} sub-layers that make a layer")
    return ["".join(found[i : i + len(allowed)]) for i in range(0, len(found), len(allowed))]


def check_parallel(arch: Arch) -> int:
    """Return the number of layers ``[N,A]F``; raises ConfigError for the first sub-layer that is another."""
    for index, layer in enumerate(arch.layers):
        letters = sorted(kind(node) for branch in layer for node in branch)
        wanted = ["F"] if index % 2 else ["A", "N"]
        if letters != wanted or any(len(branch) > 1 or branch[0].slot.share for branch in layer):
            raise _misplaced(arch, index, "F" if index % 2 else "[N,A]")
    if len(arch.layers) % 2:
        raise _misplaced(arch, len(arch.layers) - 1, "followed by F")
    return len(arch.layers) // 2


def _misplaced(arch: Arch, index: int, allowed: str) -> ConfigError:
    text = str(arch.pattern.layers[index])
    return ConfigError(
        f"layer {index} is {text}, and the class has {allowed} there", field="pattern", got=text, allowed=allowed
    )


def first(arch: Arch, letter: str) -> Any:
    """Return the config of the first block of a letter, or None."""
    return next((node.config for node in arch.nodes if kind(node) == letter), None)


def around(arch: Arch, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Return what stands around the blocks."""
    return {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.d_model,
        eps: arch.model.norm_eps,
        "tie_word_embeddings": arch.model.tie_embeddings,
    }


def heads(config: Any, d_model: int, *, always: bool = False) -> dict[str, Any]:
    """Return number and width of attention's heads; of one head where there is no attention.

    ``always``: write the width also where it follows from the number.
    """
    if config is None:
        return {"num_attention_heads": 1, "num_key_value_heads": 1, **({"head_dim": d_model} if always else {})}
    found = {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads}
    if always or config.head_width * config.heads != d_model:
        found["head_dim"] = config.head_width
    return found


def rope(config: Any, *, fraction: bool = False) -> dict[str, Any]:
    """Return the rotary positions, under the names of now and before transformers 5; with the part that turns."""
    base = 10000.0 if config is None else config.rope_base
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if fraction and config is not None:
        parameters["partial_rotary_factor"] = config.rotary / config.head_width
    return {"rope_parameters": parameters, "rope_theta": base}


def activation(*configs: Any) -> str:
    """Return transformers' name of the nonlinearity of the first block that there is."""
    return next((_NAMES[config.activation] for config in configs if config is not None), "silu")


def mamba2(config: Any, d_model: int, *, expand: bool = True) -> dict[str, Any]:
    """Return a Mamba-2 mixer by the names that Bamba, Granite and Falcon-H1 share; the latter has no ``expand``."""
    if config is None:
        return {"mamba_n_heads": 1, "mamba_d_head": 2 * d_model, "mamba_expand": 2}
    return {
        "mamba_n_heads": config.heads,
        "mamba_d_head": config.head_width,
        "mamba_n_groups": config.n_groups,
        "mamba_d_state": config.d_state,
        "mamba_d_conv": config.d_conv,
        **({"mamba_expand": whole_factor(config)} if expand else {}),
        "mamba_conv_bias": config.conv_bias,
        "mamba_proj_bias": config.bias,
    }


def gated_delta(config: Any) -> dict[str, Any]:
    """Return a Gated DeltaNet's sizes by the names that Qwen3-Next and OLMo-Hybrid share."""
    return {
        "linear_num_key_heads": config.heads,
        "linear_num_value_heads": config.value_heads,
        "linear_key_head_dim": config.key_dim,
        "linear_value_head_dim": config.value_dim,
        "linear_conv_kernel_dim": config.d_conv,
    }


def whole_factor(config: Any) -> int:
    """Return the mixer's inner width as a multiple of d_model; raises ConfigError where it is no whole multiple."""
    if config.width % config.d_model:
        raise ConfigError(
            f"the {config.label()} has d_inner={config.width}, and the class has whole multiples of "
            f"d_model={config.d_model}",
            field="d_inner",
            got=config.width,
            allowed=f"a multiple of {config.d_model}",
        )
    return int(config.width // config.d_model)


def places(layers: Sequence[str], letter: str) -> list[int]:
    """Return the indices of the layers that have a letter."""
    return [i for i, text in enumerate(layers) if letter in text]
