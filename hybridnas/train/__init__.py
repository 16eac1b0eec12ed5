"""Training: one model on one source, resumable to the bit, measured at fixed token counts; or a list of such cells.

Importing this package loads no torch; the names below arrive when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridnas.train.callbacks import Action as Action
    from hybridnas.train.callbacks import Callback as Callback
    from hybridnas.train.callbacks import EarlyStopping as EarlyStopping
    from hybridnas.train.checkpoint import load_model as load_model
    from hybridnas.train.config import TrainConfig as TrainConfig
    from hybridnas.train.experiment import Cell as Cell
    from hybridnas.train.experiment import Experiment as Experiment
    from hybridnas.train.experiment import run_cell as run_cell
    from hybridnas.train.loop import run as run
    from hybridnas.train.records import Eval as Eval
    from hybridnas.train.records import TrainResult as TrainResult
    from hybridnas.train.records import read_evals as read_evals

_HOMES = {
    "Action": "callbacks",
    "Callback": "callbacks",
    "Cell": "experiment",
    "EarlyStopping": "callbacks",
    "Eval": "records",
    "Experiment": "experiment",
    "TrainConfig": "config",
    "TrainResult": "records",
    "load_model": "checkpoint",
    "read_evals": "records",
    "run": "loop",
    "run_cell": "experiment",
}
__all__ = [
    "Action",
    "Callback",
    "Cell",
    "EarlyStopping",
    "Eval",
    "Experiment",
    "TrainConfig",
    "TrainResult",
    "load_model",
    "read_evals",
    "run",
    "run_cell",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
