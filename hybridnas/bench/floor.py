"""The arithmetic floor of the scan, run and timed on this machine instead of taken from a data sheet.

    floor = instructions * B * L * D * N / lanes   independent vector multiply-adds

on as many threads as the scan has: a loop in registers, without memory (``floor.c``). ``instructions`` is the
number of vector instructions that one vector of state entries needs, counted by hand: 14 forward (11 of them are the
exponential: product, round, difference, polynomial, exponent; then the recurrence and the sum over N), 35 forward and
backward (14, 12 to compute the states again, 9 for the gradients). Lanes: 16 with AVX-512, else 8. It is a floor for
this way of computing, at the rate of multiply-adds; memory, loads, stores and the work per channel count nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hybridnas.kernels._build import library, threads
from hybridnas.kernels._build.arguments import call, pointer, struct

SOURCE = Path(__file__).resolve().with_name("floor.c")
FORWARD, FORWARD_BACKWARD = 14, 35
_Args = struct("_Args", "count threads", "sink")


def unavailable() -> str:
    """Return why there is no floor here (no compiler), or ''."""
    found = library(SOURCE)
    return "" if found.handle is not None else found.description


def lanes() -> int:
    """Return the lanes of one vector of ``vectors.h`` as it is compiled here."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def multiply_adds(entries: int, instructions: int) -> None:
    """Run the floor of a scan with ``entries`` = B * L * D * N state entries."""
    _run("hybridnas_floor_multiply_adds", entries * instructions)


def powers(entries: int) -> None:
    """Compute as many powers of two as the scan's forward does, in registers."""
    _run("hybridnas_floor_powers", entries)


def _run(function: str, operations: int) -> None:
    sink = torch.empty(1)
    call(SOURCE, function, _Args(count=-(-operations // lanes()), threads=threads(), sink=pointer(sink)))
