"""A bar on standard error for each long reading of data, while a person looks at it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def data_bars() -> Iterator[None]:
    """Show a bar for each reading that takes longer than a second; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from hybridnas.data.progress import shown_by

    with shown_by(_Bar):
        yield


class _Bar:
    """A stage with bytes, bytes per second and time left."""

    def __init__(self, stage: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(stage, total=total)
        self._bar.start()

    def move(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def close(self) -> None:
        self._bar.stop()
