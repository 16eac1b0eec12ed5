"""What people see while a model trains: a bar in a terminal, one plain line a measurement in a pipe, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hybridnas.train.records import Eval

Report = Callable[[str], None]


class Progress:
    """Silent; the base of the others."""

    def begin(self, done: int, total: int) -> None:
        """Start showing a run that has read ``done`` of ``total`` tokens."""

    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None:
        """Show where the run is; ``loss`` is a running mean of training cross-entropy [nats per token]."""

    def measured(self, value: Eval, total: int) -> None:
        """Show a measurement."""

    def note(self, text: str) -> None:
        """Show a sentence of news."""

    def end(self) -> None:
        """Leave the screen clean."""


class Lines(Progress):
    """One plain line per measurement, handed to ``report``."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def measured(self, value: Eval, total: int) -> None:
        self._report(eval_line(value, total))

    def note(self, text: str) -> None:
        self._report(text)


class Bar(Progress):
    """A bar with loss, tokens per second and time left, on stderr; measurements scroll above it."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._waiting: list[str] = []  # news from before the bar is on

    def begin(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("train", total=total, completed=done, loss="-", speed="-")
        self._bar.start()
        for text in self._waiting:
            self._print(text)

    def step(self, tokens: int, loss: float, tokens_per_second: float) -> None:
        self._bar.update(self._task, completed=tokens, loss=f"{loss:.4f}", speed=f"{tokens_per_second:,.0f}")

    def measured(self, value: Eval, total: int) -> None:
        self._print(eval_line(value, total))

    def note(self, text: str) -> None:
        if self._bar is None:
            self._waiting.append(text)
        else:
            self._print(text)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def make_progress(wanted: bool | Report) -> Progress:
    """Return a bar (True, on a terminal), lines on stderr (True, in a pipe), lines to a callable, or silence."""
    if callable(wanted):
        return Lines(wanted)
    if not wanted:
        return Progress()
    if sys.stderr.isatty():
        return Bar()
    return Lines(lambda text: print(text, file=sys.stderr, flush=True))


def eval_line(value: Eval, total: int) -> str:
    """Return a measurement as one line of words and figures."""
    parts = [
        f"{value.tokens:>13,} of {total:,} tokens",
        f"train {value.train_loss:.4f}",
        f"valid {value.valid_loss:.4f} nats/token",
        f"accuracy {value.accuracy:.4f}",
        f"{value.tokens_per_second:,.0f} tokens/s",
    ]
    if value.bits_per_byte is not None:
        parts.insert(3, f"{value.bits_per_byte:.4f} bits/byte")
    if "dropped" in value.aux:
        parts.append(f"dropped {value.aux['dropped']:.1%}")
    return "  ".join(parts)
