"""A bar for long readings, on a terminal only; silence everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Report = Callable[[int], None]  # called with the bytes done so far


@contextlib.contextmanager
def bar(stage: str, total: int | None) -> Iterator[Report]:
    """Show how far ``stage`` is towards ``total`` [bytes; None: not known] while the block runs."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda done: progress.update(task, completed=done)
