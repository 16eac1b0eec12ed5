"""Callbacks of a training: what happens at its start, steps, measurements and end, and whether it goes on.

Tracking, pruning, early stopping and progress bars are subclasses of :class:`Callback`. The trainer writes
``metrics.jsonl`` and the checkpoint before it calls ``on_eval``, so whatever a callback does or raises, the measurement
is kept. A run that was interrupted and goes on shows its callbacks the earlier measurements first: a callback can
rebuild its state from ``on_eval`` alone, and one that reports elsewhere must accept a measurement twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hybridnas.errors import ConfigError
from hybridnas.train.records import Eval, TrainResult

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hybridnas.arch.arch import Arch
    from hybridnas.data.source import Source
    from hybridnas.train.config import TrainConfig

C = TypeVar("C")


class Action(IntEnum):
    """What a callback wants after a measurement; of several callbacks' answers the greatest counts."""

    CONTINUE = 0
    PAUSE = 1  # leave the run with its whole checkpoint; the same call goes on later
    STOP = 2  # end the run here for good


@dataclass
class Run:
    """One training as its callbacks see it; the trainer keeps ``step``, ``loss`` and ``tokens_per_second`` current."""

    config: TrainConfig
    source: Source
    folder: Path | None  # None: nothing is written
    arch: Arch | None  # None: a module that was not built from an architecture
    model: nn.Module | None  # None: a finished run whose weights were not kept
    device: torch.device
    evals: list[Eval] = field(default_factory=list)  # all so far, those of earlier processes included
    step: int = 0  # optimizer steps done
    branch_steps: int = 0  # steps of branches that were left again (schedule wsd)
    loss: float = math.nan  # running mean of the training cross-entropy [nats per token]
    tokens_per_second: float = 0.0  # of training alone, since the last measurement

    @property
    def tokens(self) -> int:
        """Training tokens read so far."""
        return self.step * self.config.step_tokens

    @property
    def trained_tokens(self) -> int:
        """Training tokens of all steps so far, those of branches included: what grows at every step."""
        return (self.step + self.branch_steps) * self.config.step_tokens

    @property
    def total_tokens(self) -> int:
        """Training tokens that the whole run will have read: ``config.tokens`` rounded up to whole steps."""
        return self.config.steps * self.config.step_tokens


class Callback:
    """Does nothing; the base of all callbacks. An exception that a callback raises ends the run."""

    def on_start(self, run: Run) -> None:
        """Run before the first step of this process; ``run.step`` is above 0 where an earlier one got to."""

    def on_step(self, run: Run, step: int) -> None:
        """Run after optimizer step ``step`` (from 1)."""

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        """Run after a measurement; the answer decides whether the run goes on."""
        return Action.CONTINUE

    def on_end(self, run: Run, result: TrainResult) -> None:
        """Run once when the run is left with a result (completed, stopped, paused or failed), not after Ctrl-C."""


class OnEval(Callback):
    """Calls a function after every measurement; it may answer with an :class:`Action`, or None to continue."""

    def __init__(self, function: Callable[[Eval], Action | None]) -> None:
        self._function = function

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        return self._function(evaluation) or Action.CONTINUE


class StopAtAccuracy(Callback):
    """Stops a run whose validation accuracy has reached ``accuracy`` [0 to 1]."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        return Action.STOP if evaluation.accuracy >= self.accuracy else Action.CONTINUE


class EarlyStopping(Callback):
    """Stops a run whose validation loss has not fallen by ``min_delta`` [nats] in ``patience`` measurements."""

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ConfigError(
                f"EarlyStopping patience={patience} must be >= 1", field="patience", got=patience, allowed=">= 1"
            )
        self.patience = patience
        self.min_delta = min_delta

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        losses = [value.valid_loss for value in run.evals if value.tokens <= evaluation.tokens]
        best, since = math.inf, 0
        for loss in losses:
            best, since = (loss, 0) if loss < best - self.min_delta else (best, since + 1)
        return Action.STOP if since >= self.patience else Action.CONTINUE


def checked_callbacks(callbacks: Iterable[C], kind: type[C], field: str = "callbacks") -> tuple[C, ...]:
    """Return the callbacks as a tuple; raises ConfigError for one that is none, before anything has begun."""
    wrong = [callbacks] if isinstance(callbacks, kind) or not isinstance(callbacks, Iterable) else None
    given = () if wrong is not None else tuple(callbacks)
    wrong = wrong or [item for item in given if not isinstance(item, kind)]
    if wrong:
        got = repr(wrong[0]) if isinstance(wrong[0], type) else type(wrong[0]).__name__
        raise ConfigError(
            f"{field} takes a list of {kind.__name__} instances, got {got}",
            field=field,
            got=got,
            allowed=f"list of {kind.__name__}",
        )
    return given


class CallbackList(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks: Sequence[Callback] = checked_callbacks(callbacks, Callback)

    def on_start(self, run: Run) -> None:
        for callback in self.callbacks:
            callback.on_start(run)

    def on_step(self, run: Run, step: int) -> None:
        for callback in self.callbacks:
            callback.on_step(run, step)

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        answers = [callback.on_eval(run, evaluation) for callback in self.callbacks]
        return max(answers, default=Action.CONTINUE)

    def on_end(self, run: Run, result: TrainResult) -> None:
        for callback in self.callbacks:
            callback.on_end(run, result)
