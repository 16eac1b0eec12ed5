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
    NonFiniteInputError,
    PatternError,
    StudyError,
    TrainingDiverged,
    TrainingError,
)
from hybridnas.registry import register_block

importlib.import_module("hybridnas.hardware")  # before torch is: sets how long OpenMP's threads wait

if TYPE_CHECKING:  # the same names as in _LAZY, for type checkers and editors
    from hybridnas.api import build, from_hf, list_blocks, list_search_spaces
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.match import match
    from hybridnas.arch.model import HybridLM
    from hybridnas.arch.pattern import Pattern
    from hybridnas.arch.presets import list_presets, preset, register_preset
    from hybridnas.cost import Cost
    from hybridnas.data.task import register_task
    from hybridnas.export.load import load
    from hybridnas.grafting.operation import graft
    from hybridnas.ladders.ladder import ladder
    from hybridnas.plugins import load_plugins
    from hybridnas.search_spaces.listing import register_space
    from hybridnas.studies import create_study, load_study
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.fit import fit

    __version__: str

_LAZY = {  # public name -> the module that is imported when the name is first used
    "Arch": "hybridnas.arch.arch",
    "Cost": "hybridnas.cost",
    "HybridLM": "hybridnas.arch.model",
    "Pattern": "hybridnas.arch.pattern",
    "TrainConfig": "hybridnas.train.config",
    "build": "hybridnas.api",
    "create_study": "hybridnas.studies",
    "fit": "hybridnas.train.fit",
    "from_hf": "hybridnas.api",
    "graft": "hybridnas.grafting.operation",
    "ladder": "hybridnas.ladders.ladder",
    "list_blocks": "hybridnas.api",
    "list_presets": "hybridnas.arch.presets",
    "list_search_spaces": "hybridnas.api",
    "load": "hybridnas.export.load",
    "load_plugins": "hybridnas.plugins",
    "load_study": "hybridnas.studies",
    "match": "hybridnas.arch.match",
    "preset": "hybridnas.arch.presets",
    "register_preset": "hybridnas.arch.presets",
    "register_space": "hybridnas.search_spaces.listing",
    "register_task": "hybridnas.data.task",
}

__all__ = [
    "Arch",
    "CheckpointError",
    "ConfigError",
    "Cost",
    "DataError",
    "ExportError",
    "GraphError",
    "HybridLM",
    "HybridNASError",
    "KernelInputError",
    "KernelUnavailableError",
    "LayoutError",
    "MatchError",
    "NonFiniteInputError",
    "Pattern",
    "PatternError",
    "StudyError",
    "TrainConfig",
    "TrainingDiverged",
    "TrainingError",
    "__version__",
    "build",
    "create_study",
    "fit",
    "from_hf",
    "graft",
    "ladder",
    "list_blocks",
    "list_presets",
    "list_search_spaces",
    "load",
    "load_plugins",
    "load_study",
    "match",
    "preset",
    "register_block",
    "register_preset",
    "register_space",
    "register_task",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("hybridnas")
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'hybridnas' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
