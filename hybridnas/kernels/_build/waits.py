"""Short waits of OpenMP's threads in a process that imported torch before this package.

libgomp reads how long a waiting thread spins when it is loaded: for milliseconds, unless GOMP_SPINCOUNT says less, as
``hybridnas.hardware`` has it say. Where torch was there first, one thing still shortens the waits: with more OpenMP
threads than processors libgomp spins 1,000 times at most (GCC's manual, GOMP_SPINCOUNT), which is the same. So a
second team is opened, which sleeps from then on, in a thread that holds it.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch

from hybridnas import hardware
from hybridnas.kernels._build import library
from hybridnas.kernels._build.arguments import call, struct

SOURCE = Path(__file__).resolve().with_name("waits.c")
_Args = struct("_Args", "threads", "")
_LOST = (
    "OpenMP's threads spin while they wait, and beside any other load on this machine a step may take 25 times as long "
    "(import hybridnas before torch, or set GOMP_SPINCOUNT=1000)"
)

_opened = False  # state of the process: the second team stays until it ends


def shorten_waits() -> None:
    """Make the waits short where they are long and there is a partner to wait for; once in a process.

    Where the helper cannot be compiled, one warning says what it costs and what to do.
    """
    global _opened
    if _opened or not hardware.LONG_WAITS or sys.platform != "linux" or torch.get_num_threads() == 1:
        return
    _opened = True
    if "libgomp" not in Path("/proc/self/maps").read_text():  # another OpenMP, which does not spin for as long
        return
    if library(SOURCE, _LOST).handle is None:
        return
    team = max(0, hardware.usable_cores() - torch.get_num_threads()) + 2  # more than processors, with torch's own
    ready = threading.Event()

    def hold() -> None:
        call(SOURCE, "hybridnas_open_team", _Args(threads=team))
        ready.set()
        threading.Event().wait()

    threading.Thread(target=hold, name="hybridnas: short waits", daemon=True).start()
    ready.wait()
