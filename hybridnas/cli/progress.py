"""What people see while a model trains: a bar on a terminal, one plain line a measurement in a pipe.

A callback of the trainer, and the only progress bar of the package; libraries log instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hybridnas.train.callbacks import Action, Callback, Run
from hybridnas.train.records import Eval, TrainResult, eval_line


class ProgressLines(Callback):
    """One line per measurement of this process, handed to ``report``; by default written to standard error."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._known = 0  # training tokens of the measurements of earlier processes

    def on_start(self, run: Run) -> None:
        self._known = run.evals[-1].tokens if run.evals else 0
        if 0 < run.step < run.config.steps:
            self._report(f"{run.folder}: going on from {run.tokens:,} of {run.total_tokens:,} tokens")

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        if evaluation.tokens > self._known:
            self._report(eval_line(evaluation, run.total_tokens))
        return Action.CONTINUE


class ProgressBar(ProgressLines):
    """A bar with loss, tokens per second and time left, on standard error; measurements scroll above it."""

    def __init__(self) -> None:
        super().__init__(self._print)
        self._bar: Any = None
        self._task: Any = None

    def on_start(self, run: Run) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        total = run.config.trained_steps() * run.config.step_tokens
        self._task = self._bar.add_task("train", total=total, completed=run.trained_tokens, loss="-", speed="-")
        self._bar.start()
        super().on_start(run)

    def on_step(self, run: Run, step: int) -> None:
        speed = f"{run.tokens_per_second:,.0f}"
        self._bar.update(self._task, completed=run.trained_tokens, loss=f"{run.loss:.4f}", speed=speed)

    def on_end(self, run: Run, result: TrainResult) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def progress() -> Callback:
    """Return a bar where standard error is a terminal, else lines."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()
