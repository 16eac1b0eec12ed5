"""The public verbs that join rooms: build a model from whatever names it, list what exists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.model import HybridLM


def build(
    what: str | Arch | Mapping[str, Any] | Path,
    *,
    impl: str = "auto",
    seed: int = 0,
    device: str | None = None,
    **overrides: Any,
) -> HybridLM:
    """Build a model from a preset name, a pattern string, an Arch, its dict, or an exported folder.

    ``overrides`` change the architecture (``d_model=128``, ``n_experts=8``); a folder takes none, its weights are
    loaded. A pattern needs ``d_model`` and ``vocab_size``. Raises ConfigError, PatternError or ExportError.
    """
    from hybridnas.arch.model import HybridLM

    if isinstance(what, Path) or (isinstance(what, str) and (Path(what) / "config.json").is_file()):
        from hybridnas.export.load import load

        if overrides:
            raise ConfigError(f"an exported folder cannot be changed by {sorted(overrides)}; build its arch instead")
        return load(what, device=device or "auto")
    return HybridLM(resolve(what, **overrides), impl=impl, seed=seed, device=device)


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
        raise ConfigError(f"build takes a preset name, pattern, Arch, dict or folder, got {type(what).__name__}")
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
