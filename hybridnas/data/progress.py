"""Progress of long readings, as log lines of ``hybridnas.data`` at level INFO."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator

from hybridnas.units import human_bytes

Report = Callable[[int], None]  # called with the bytes done so far
SECONDS = 5.0  # between two lines: what takes less is not reported at all
log = logging.getLogger("hybridnas.data")


@contextlib.contextmanager
def reporting(stage: str, total: int | None) -> Iterator[Report]:
    """Log how far ``stage`` is towards ``total`` [bytes; None: not known] while the block runs."""
    last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS:
            last = time.monotonic()
            log.info("%s: %s%s", stage, human_bytes(done), f" of {human_bytes(total)}" if total else "")

    yield report
