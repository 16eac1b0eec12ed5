"""read(model or folder): a model of a transformers class as a HybridLM of the same function."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.errors import ConfigError, ExportError
from hybridnas.export.hf.family import FAMILIES, Family
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Loaders, as_in_class, filled
from hybridnas.export.layout import CONFIG, INDEX, WEIGHTS, home
from hybridnas.hardware import Impl


def read_arch(config: Mapping[str, Any] | object) -> Arch:
    """Return the architecture that a config of transformers describes: an object, or the content of config.json.

    Raises ConfigError, with ``field``, ``got`` and ``allowed``, for a ``model_type`` that is not known and for values
    that our blocks cannot express.
    """
    family, values = _family(_mapping(config))
    return arch_of(family, family.settings(values))


def read(model_or_folder: nn.Module | str | Path, *, impl: str | Impl = Impl.AUTO) -> HybridLM:
    """Return a model of a transformers class as ours, in evaluation mode, with the same function.

    ``model_or_folder``: a model of transformers (``...ForCausalLM``), or a folder with config.json and safetensors as
    transformers or the vendor wrote it. Weights keep their dtype, but for those that stay in float32. No code of the
    folder is run and no pickle is loaded.

    Raises ConfigError for a model type or a setting that we do not have, ExportError for a folder or weights that are
    missing, damaged or of another model.
    """
    if isinstance(model_or_folder, nn.Module):
        module, where = model_or_folder, f"the given {type(model_or_folder).__name__}"
        if not hasattr(module, "config"):
            raise ConfigError(
                f"{where} has no config, so it is no model of transformers; give one, or a folder",
                field="model_or_folder",
                got=type(module).__name__,
                allowed="a model of transformers, or a folder",
            )
        config = _mapping(module.config)
        tensors = module.state_dict()
        stored: Loaders = {name: functools.partial(tensors.__getitem__, name) for name in tensors}
    else:
        folder = home(model_or_folder)
        config, where = _config_of(folder), str(folder)
        _family(config)  # a model that we do not know is refused before its weights are looked at
        stored = _stored(folder)
    family, values = _family(config)
    settings = family.settings(values)
    arch = arch_of(family, settings)
    model = HybridLM(arch, impl=impl, device="meta")
    whole, names = model.state_dict(keep_vars=True), dict[int, str]()
    first = {name: names.setdefault(id(tensor), name) for name, tensor in whole.items()}  # of those that are shared
    expected = {name: tensor for name, tensor in whole.items() if first[name] == name}
    theirs = as_in_class(stored, family.renames)
    pieces = list(family.pieces(settings, arch))
    embedding = next(piece.theirs for piece in pieces if piece.ours == "embedding.weight")
    unused = [*family.unused, r".*rotary_emb\.inv_freq"]
    if arch.model.tie_embeddings and "lm_head.weight" in theirs:
        if embedding in theirs and not torch.equal(theirs["lm_head.weight"](), theirs[embedding]()):
            raise ExportError(
                f"{where} has tensors {embedding!r} and 'lm_head.weight' that differ, but its config ties them; "
                f"set tie_word_embeddings to false there",
                field="tie_word_embeddings",
                got=True,
                allowed=(False,),
            )
        unused.append("lm_head.weight")
    found = filled(expected, pieces, theirs, unused, where)
    model.load_state_dict({name: found[own] for name, own in first.items()}, assign=True)
    if arch.model.tie_embeddings:
        model.head.weight = model.embedding.weight
    for block in model.blocks():
        block.widen()
    return model.eval()


def _mapping(config: Mapping[str, Any] | object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if hasattr(config, "to_dict"):
        return cast("Mapping[str, Any]", config.to_dict())
    raise ConfigError(
        f"a config is an object of transformers or the content of config.json, got {type(config).__name__}",
        field="config",
        got=type(config).__name__,
        allowed="a config of transformers, or a mapping",
    )


def _family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Return the family of a config, and the values of its language model."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(
            f"the config has model_type={kind!r}; give a config of transformers, which names it",
            field="model_type",
            got=kind,
            allowed=tuple(FAMILIES),
        )
    if config.get("auto_map") and kind not in FAMILIES:
        raise ConfigError(
            f"the config has model_type={kind!r}, which we do not know, and auto_map, code of its own, which is never "
            f"run; allowed model types: {', '.join(FAMILIES)}",
            field="auto_map",
            got=config["auto_map"],
            allowed=tuple(FAMILIES),
        )
    family = FAMILIES.get(kind)
    if config.get("quantization_config") is not None:
        raise ConfigError(
            "the config has quantization_config, and quantized weights cannot be read; give the model in bfloat16",
            field="quantization_config",
            got=config["quantization_config"],
            allowed=None,
        )
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return family, config
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    return family, {**text, "model_type": kind, "tie_word_embeddings": tied}


MOST_LAYERS = 10_000  # more are a damaged or hostile config: a pattern of so many letters is built before any weight


def arch_of(family: Family, settings: Settings) -> Arch:
    """Return the architecture of a config; raises ConfigError also for settings that describe no model."""
    layers = settings["num_hidden_layers"] if "num_hidden_layers" in family.defaults else 1
    if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
        raise ConfigError(
            f"config of model_type {settings.model_type!r} has num_hidden_layers={layers}, allowed: 1 to "
            f"{MOST_LAYERS:,}; give the config.json of a model",
            field="num_hidden_layers",
            got=layers,
            allowed=f"1 to {MOST_LAYERS}",
        )
    try:
        return family.arch(settings)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:  # sizes of 0, text for a list
        raise ConfigError(
            f"config of model_type {settings.model_type!r} has settings that describe no model "
            f"({type(error).__name__}: {error}); give the config.json of a model",
            field="config",
        ) from None


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ExportError(
            f"{path} {why}; give a folder with config.json and safetensors", field=CONFIG, got=str(folder)
        ) from None
    if not isinstance(config, dict):
        raise ExportError(f"{path} holds no settings; give a folder of transformers", field=CONFIG, got=str(folder))
    return config


def _stored(folder: Path) -> Loaders:
    """Return how to read every tensor of a folder's safetensors; raises ExportError for missing or damaged files."""
    index = folder / INDEX
    names = [WEIGHTS]
    if index.is_file():
        try:
            names = sorted({str(x) for x in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ExportError(f"{index} is damaged ({error}); download the model again", field=INDEX) from None
    stored: Loaders = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or path.suffix != ".safetensors" or not path.is_file():
            pickled = " (pickled weights are never loaded)" if any(folder.glob("*.bin")) else ""
            raise ExportError(
                f"{folder} has no weights {name!r}{pickled}; give a folder with safetensors", field=name, got=name
            )
        try:
            file: Any = safe_open(path, framework="pt")
            stored |= {key: functools.partial(file.get_tensor, key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ExportError(
                f"{path} is truncated or damaged ({error}); download the model again", field=name
            ) from None
    return stored
