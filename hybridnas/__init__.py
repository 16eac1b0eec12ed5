"""hybridnas: architecture search for hybrid sequence models at matched active parameters.

>>> import hybridnas
>>> model = hybridnas.build("moe_mamba", d_model=64, n_blocks=2, n_experts=4, vocab_size=256)

Nothing heavy is imported here: every public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hybridnas.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    GraphError,
    HybridNASError,
    KernelInputError,
    KernelUnavailableError,
    LayoutError,
    MatchError,
    PatternError,
    StudyError,
    TrainingError,
)
from hybridnas.registry import register_block

if TYPE_CHECKING:
    from hybridnas.api import build, list_blocks, list_search_spaces
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.match import match
    from hybridnas.arch.pattern import parse
    from hybridnas.arch.presets import list_presets, preset
    from hybridnas.export.load import load
    from hybridnas.train.fit import fit

_LAZY = {
    "Arch": "hybridnas.arch.arch",
    "build": "hybridnas.api",
    "fit": "hybridnas.train.fit",
    "list_blocks": "hybridnas.api",
    "list_presets": "hybridnas.arch.presets",
    "list_search_spaces": "hybridnas.api",
    "load": "hybridnas.export.load",
    "match": "hybridnas.arch.match",
    "parse": "hybridnas.arch.pattern",
    "preset": "hybridnas.arch.presets",
}

__all__ = [
    "Arch",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "ExportError",
    "GraphError",
    "HybridNASError",
    "KernelInputError",
    "KernelUnavailableError",
    "LayoutError",
    "MatchError",
    "PatternError",
    "StudyError",
    "TrainingError",
    "build",
    "fit",
    "list_blocks",
    "list_presets",
    "list_search_spaces",
    "load",
    "match",
    "parse",
    "preset",
    "register_block",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hybridnas' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
