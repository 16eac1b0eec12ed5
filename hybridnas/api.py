"""Functions that need several packages: build a model from whatever names it, list what exists."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM
    from hybridnas.hardware import Impl

_LOG = logging.getLogger("hybridnas.api")


def build(
    what: str | Arch | Mapping[str, Any] | Path,
    *,
    impl: str | Impl = "auto",
    seed: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> HybridLM:
    """Build a model from a preset name, a pattern string, an Arch, its dict, or an exported folder.

    ``overrides`` change the architecture (``d_model=128``, ``n_experts=8``). ``seed`` (default 0) draws the weights.
    ``device``: None leaves it to torch (its default device, or an enclosing ``with torch.device(...)``); ``"auto"``
    takes a GPU where there is one. A pattern needs ``d_model`` and ``vocab_size``.

    A folder is a Path, or text with a separator (``./best``, ``runs/x/best``) or ``~``; other text is a preset name or
    a pattern first, and a folder of the working directory only where it is neither. A folder's weights are loaded, so
    that it takes neither overrides nor a seed.

    Raises ConfigError, PatternError or ExportError.
    """
    from hybridnas.arch.model import HybridLM

    folder = _folder(what)
    if folder is not None:
        from hybridnas.export.load import load

        given = [*sorted(overrides), *(["seed"] if seed is not None else [])]
        if given:
            raise ConfigError(
                f"build({str(what)!r}) loads an exported folder, whose architecture and weights are given, "
                f"got {', '.join(given)} too; leave that out, or build a changed architecture from load(...).arch",
                field=given[0],
                got=seed if given == ["seed"] else overrides.get(given[0]),
                allowed="impl, device",
            )
        return load(folder, device, impl=impl)
    assert not isinstance(what, Path)
    return HybridLM(resolve(what, **overrides), impl=impl, seed=0 if seed is None else seed, device=_device(device))


def from_hf(
    folder_or_model: str | Path | nn.Module,
    *,
    impl: str | Impl = "auto",
    device: str | torch.device | None = None,
) -> HybridLM:
    """Return a pretrained model of a transformers class as ours, in evaluation mode: same function, same weights.

    ``folder_or_model``: a folder here with ``config.json`` and safetensors, or a model of transformers, which is not
    needed for a folder. ``device``: None leaves the model on the CPU; ``"auto"`` takes a GPU where there is one.
    Weights keep their dtype, but for those that stay in float32.

    Raises ConfigError for a ``model_type`` or a setting that our blocks do not have, ExportError for a folder or
    weights that are missing, damaged or of another model.
    """
    from hybridnas.export.hf import read

    model = read(folder_or_model, impl=impl)
    return model if device is None else model.to(_device(device))


def _folder(what: object) -> Path | None:
    """Return the folder that is meant, or None for an architecture."""
    if isinstance(what, Path):
        return what
    if not isinstance(what, str):
        return None
    if what.startswith(("~", ".")) or "/" in what or os.sep in what:
        return Path(what)
    if not (Path(what) / "config.json").is_file():
        return None
    from hybridnas.arch.presets import list_presets

    if what in list_presets() or _is_pattern(what):
        kind = "preset" if what in list_presets() else "pattern"
        _LOG.warning("building the %s %r, not the folder of that name; write './%s' for the folder", kind, what, what)
        return None
    _LOG.info("loading the folder %s, since no preset or pattern has that name", Path(what).resolve())
    return Path(what)


def _is_pattern(text: str) -> bool:
    from hybridnas.arch.pattern import parse
    from hybridnas.errors import PatternError

    try:
        parse(text)
    except PatternError:
        return False
    return True


def _device(device: str | torch.device | None) -> torch.device | None:
    import torch

    from hybridnas.hardware import pick_device

    if isinstance(device, str):
        return torch.device("meta") if device == "meta" else pick_device(device)
    return device


def resolve(what: str | Arch | Mapping[str, Any], **overrides: Any) -> Arch:
    """Return the architecture that a preset name, pattern string, Arch or dict means, with overrides applied."""
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.presets import list_presets, preset

    if isinstance(what, Arch):
        return what.replace(**overrides) if overrides else what
    if isinstance(what, Mapping):
        arch = Arch.from_dict(what)
        return arch.replace(**overrides) if overrides else arch
    if not isinstance(what, str):
        raise ConfigError(
            f"build takes a preset name, pattern, Arch, dict or folder, got {type(what).__name__}",
            field="what",
            got=type(what).__name__,
            allowed="str, Path, Arch or dict",
        )
    if what in list_presets():
        return preset(what, **overrides)
    if what.islower() and what.replace("_", "").isalnum():  # a pattern has capitals, so this was meant as a name
        preset(what)  # raises with the presets' names
    return Arch.from_pattern(what, **overrides)


def list_blocks() -> dict[str, str]:
    """Return pattern letter -> block name of every registered block."""
    from hybridnas.registry import BLOCKS

    return {letter: BLOCKS.get(letter).name for letter in BLOCKS}


def list_search_spaces() -> list[str]:
    """Return the names of the search spaces that come with the package and lie in ./search_spaces."""
    from hybridnas.search_spaces.listing import list_spaces

    return list_spaces()
