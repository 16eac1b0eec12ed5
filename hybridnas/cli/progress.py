"""What people see while a model trains or a search runs: bars on a terminal, plain lines in a pipe.

Callbacks of the trainer and of a search, and the only progress bars of the package; libraries log instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hybridnas.analysis.ranking import winner
from hybridnas.report.callbacks import ConsoleLines, time_left
from hybridnas.report.html import short
from hybridnas.report.status import TRAINED
from hybridnas.study.callbacks import StudyEnded, StudyStarted, TrialEnded, TrialStarted
from hybridnas.train.callbacks import Action, Callback, Run
from hybridnas.train.records import Eval, TrainResult, eval_line
from hybridnas.units import duration


class ProgressLines(Callback):
    """One line per measurement of this process, handed to ``report``; by default written to standard error."""

    def __init__(self, report: Callable[[str], None] | None = None) -> None:
        self._report = report or (lambda text: print(text, file=sys.stderr, flush=True))
        self._known = 0  # training tokens of the measurements of earlier processes

    def on_start(self, run: Run) -> None:
        self._known = run.evals[-1].tokens if run.evals else 0
        if 0 < run.step < run.config.steps:
            last = run.evals[-1] if run.evals else None
            branched = last is not None and last.aux.get("annealed") and last.step > run.step
            where = ", the state before the last decay" if branched else ""
            self._report(f"{run.folder}: going on from {run.tokens:,} of {run.total_tokens:,} tokens{where}")

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


class SearchProgress(ConsoleLines):
    """Two bars below the lines of a search's trials: the trial that trains, with its name, and the whole search.

    ``training`` is what moves the first bar: a callback for the search's trainings.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=sys.stdout)
        self._room = max(20, console.width - 46)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Progress(*columns, console=console, transient=True)
        self._study = self._bars.add_task("search", total=None, note="")
        self._trial = self._bars.add_task("", total=None, note="", visible=False)
        self._done = 0
        super().__init__(lambda text: self._bars.console.print(text, markup=False, highlight=False), console.width)
        self.training = _TrialBar(self._bars, self._trial)

    def on_study_start(self, event: StudyStarted) -> None:
        """Show the bars and the head of the columns."""
        super().on_study_start(event)
        self._done = sum(record.state in TRAINED for record in event.records)
        self._bars.update(self._study, total=event.meta.n_trials, completed=self._done, note="")
        self._bars.start()

    def on_trial_start(self, event: TrialStarted) -> None:
        """Name the trial before it trains."""
        record = event.record
        name = " ".join(filter(None, [record.preset, record.pattern]))
        of = f"{self._done + 1}/{self._meta.n_trials}" if self._meta and self._meta.n_trials else str(self._done + 1)
        text = f"{of} #{record.number} {short(name, self._room - 12)}"
        self._bars.reset(self._trial, description=text, note="", visible=True)

    def on_trial_end(self, event: TrialEnded) -> None:
        """Show the trial's line, the best so far and the time left."""
        super().on_trial_end(event)
        records = list(event.records.values())
        self._done = sum(record.state in TRAINED for record in records)
        best, meta = winner(records), self._meta
        left = None if meta is None else time_left(event, meta)
        words = "" if best is None else f"best {best.valid_loss:.4f} {short(best.name, self._room - 18)}"
        self._bars.update(self._study, completed=self._done, description=words or "search",
                          note="" if left is None else f"about {duration(left)} left")  # fmt: skip
        self._bars.update(self._trial, visible=False)

    def on_study_end(self, event: StudyEnded) -> None:
        """Take the bars away; what is printed next stands below the lines."""
        self._bars.stop()


class _TrialBar(Callback):
    """Moves the bar of the trial that trains."""

    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def on_start(self, run: Run) -> None:
        total = run.config.trained_steps() * run.config.step_tokens
        self._bars.update(self._task, total=total, completed=run.trained_tokens, visible=True)

    def on_step(self, run: Run, step: int) -> None:
        note = f"loss {run.loss:.4f}  {run.tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._task, completed=run.trained_tokens, note=note)
