"""Progress of long readings: a display that a command sets, and log lines of ``hybridnas.data`` at level INFO."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

from hybridnas.units import human_bytes

Report = Callable[[int], None]  # called with the bytes done so far
SECONDS = 5.0  # between two lines: what takes less is not reported at all
DELAY = 1.0  # seconds after which a display opens: most readings are over by then
INTERVAL = 0.1  # seconds between two moves of a display
log = logging.getLogger("hybridnas.data")


class Display(Protocol):
    """What shows one reading, as a bar."""

    def move(self, done: int) -> None:
        """Show the bytes done so far."""

    def close(self) -> None:
        """Take it away."""


Open = Callable[[str, "int | None"], Display]  # from a stage and its bytes (None: not known)
_shown_by: ContextVar[Open | None] = ContextVar("shown_by", default=None)


@contextlib.contextmanager
def shown_by(display: Open) -> Iterator[None]:
    """Show readings of this thread by ``display`` while the block runs."""
    token = _shown_by.set(display)
    try:
        yield
    finally:
        _shown_by.reset(token)


@contextlib.contextmanager
def reporting(stage: str, total: int | None) -> Iterator[Report]:
    """Show and log how far ``stage`` is towards ``total`` [bytes; None: not known] while the block runs."""
    began = logged = moved = time.monotonic()
    make, shown = _shown_by.get(), None

    def report(done: int) -> None:
        nonlocal logged, moved, shown
        now = time.monotonic()
        if now - logged >= SECONDS:
            logged = now
            log.info("%s: %s%s", stage, human_bytes(done), f" of {human_bytes(total)}" if total else "")
        if make is not None and now - began >= DELAY and now - moved >= INTERVAL:
            moved = now
            shown = shown or make(stage, total)
            shown.move(done)

    try:
        yield report
    finally:
        if shown is not None:
            shown.close()
