"""Many trainings in a row: cells in, results out, with resume, a time limit and callbacks.

A cell is one training. Cells may come from an iterator that chooses the next one by earlier results: it is advanced
only when the result of the cell before is there. A cell that was finished by an earlier call is read back from its
folder, never trained again; one that was interrupted goes on. The search, the suites and the table builder use this.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hybridnas.data.source import Source
from hybridnas.errors import CheckpointError, ConfigError, DataError, KernelUnavailableError, TrainingError
from hybridnas.files import write_text
from hybridnas.train.callbacks import Callback
from hybridnas.train.config import TrainConfig
from hybridnas.train.loop import Trainee
from hybridnas.train.loop import run as train_run
from hybridnas.train.records import TrainResult, read_evals

ERROR = "error.txt"  # in a cell's folder: the traceback of what went wrong in it alone
log = logging.getLogger("hybridnas.train")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of an experiment."""

    key: str  # names the cell; no two cells of an experiment share one
    model: Trainee  # an Arch, a module from ids to logits, or a function that builds one
    source: Source
    config: TrainConfig  # its seed included
    folder: Path | None = None  # None: nothing is written, so nothing can be resumed
    device: str = "auto"
    impl: str = "auto"
    keep_checkpoint: bool = True  # keep the weights when the cell has ended
    callbacks: tuple[Callback, ...] = ()  # of this cell alone, before those of the experiment
    labels: Mapping[str, str] = field(default_factory=dict)  # kept in run.json to name the run by, such as its preset
    facts: Mapping[str, Any] = field(default_factory=dict)  # whatever the caller wants to find beside the result


class CellResult(NamedTuple):
    """A cell and what came of it."""

    cell: Cell
    result: TrainResult


def run_cell(cell: Cell, *, callbacks: Iterable[Callback] = (), max_seconds: float | None = None) -> TrainResult:
    """Train one cell, go on with it, or read back what it left.

    What the cell's own model provokes makes a result of status "failed", not final, with the traceback in the folder's
    ``error.txt``. Errors that would end the next cell, too, are raised: CheckpointError, DataError,
    KernelUnavailableError, TrainingError (a full disk, another process in the folder) and OSError. Ctrl-C saves and
    raises KeyboardInterrupt.
    """
    try:
        return train_run(
            cell.model,
            cell.source,
            cell.config,
            folder=cell.folder,
            device=cell.device,
            impl=cell.impl,
            callbacks=[*cell.callbacks, *callbacks],
            keep_checkpoint=cell.keep_checkpoint,
            max_seconds=max_seconds,
            labels=cell.labels,
        )
    except (CheckpointError, DataError, KernelUnavailableError, TrainingError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        evals = []
        if cell.folder is not None:
            write_text(cell.folder / ERROR, traceback.format_exc())
            reason = f"{reason} (see {cell.folder / ERROR})"
            evals = read_evals(cell.folder)
        log.warning("%s failed: %s", cell.key, reason)
        return TrainResult("failed", reason, evals, None, cell.folder, final=False)


class Experiment:
    """Runs cells one after another; :meth:`run` may be called in another process to go on.

    ``minutes``: stop after this long, inside a cell, whose training then goes on at the next call; with ``whole_cells``
    a cell is started only if one as long as the longest so far would end in time. ``on_result`` is called with every
    result before the next cell is asked for. Ctrl-C saves the cell and raises KeyboardInterrupt; :attr:`results` holds
    those before it.
    """

    def __init__(
        self,
        cells: Iterable[Cell],
        *,
        callbacks: Iterable[Callback] = (),
        minutes: float | None = None,
        whole_cells: bool = False,
        on_result: Callable[[CellResult], None] | None = None,
    ) -> None:
        self._cells = cells
        self._callbacks = tuple(callbacks)
        self._seconds = None if minutes is None else 60 * minutes
        self._whole_cells = whole_cells
        self._on_result = on_result
        self._started = time.monotonic()
        self.results: list[CellResult] = []
        self.complete = False  # whether every cell has ended

    @property
    def seconds_left(self) -> float | None:
        """What is left of ``minutes`` [s], at least 0; None: no limit."""
        if self._seconds is None:
            return None
        return max(0.0, self._seconds - (time.monotonic() - self._started))

    def run(self) -> list[CellResult]:
        """Run the cells until all have ended or time is up; returns the results so far.

        Raises as :func:`run_cell`, and ConfigError for a key that comes twice.
        """
        seen: set[str] = set()
        longest = 0.0
        self._started = time.monotonic()
        for cell in self._cells:
            if cell.key in seen:
                raise ConfigError(f"experiment has two cells {cell.key!r}; give each its own key", field="key")
            seen.add(cell.key)
            left = self.seconds_left
            if left is not None and left <= (longest if self._whole_cells else 0.0):
                return self.results
            began = time.monotonic()
            limit = None if self._whole_cells else left
            result = run_cell(cell, callbacks=self._callbacks, max_seconds=limit)
            longest = max(longest, time.monotonic() - began)
            if result.status == "stopped" and not result.final:
                return self.results
            self.results.append(CellResult(cell, result))
            if self._on_result is not None:
                self._on_result(self.results[-1])
        self.complete = True
        return self.results
