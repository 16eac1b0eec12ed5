"""Work measured in a process of its own: its time and its peak memory, untouched by what ran before.

``measured("hybridnas.bench.suites.memory:work", {...})`` starts a Python, which calls ``work(**arguments)`` to build
what is needed and gets back the function to measure.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

_ENTRY = "import sys; from hybridnas.bench.child import main; main(sys.argv[1])"
_PROC = Path("/proc/self")


class Child(NamedTuple):
    """Seconds of the work, bytes of memory at its peak beyond what was there before it, or why there are none."""

    seconds: float | None = None
    extra_bytes: int | None = None
    rss_bytes: int | None = None  # memory of the whole process at that peak
    value: Any = None  # what the work returned
    failed: str = ""


def measured(
    function: str,
    arguments: dict[str, Any],
    *,
    threads: int | None = None,
    limit: float = 600.0,
    variables: dict[str, str] | None = None,
) -> Child:
    """Run one function in a fresh process; a crash, a lack of memory or a lack of patience ends up in ``failed``.

    ``limit`` in seconds; ``variables`` are added to its environment.
    """
    asked = json.dumps({"function": function, "arguments": arguments, "threads": threads})
    environment = {**os.environ, **(variables or {})}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH")) if p)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ENTRY, asked], capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return Child(failed=f"stopped: took longer than {limit:g} s")
    if done.returncode:
        if done.returncode < 0:
            return Child(failed=f"ended by signal {-done.returncode}, as a lack of memory does")
        return Child(failed=(done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    return Child(**json.loads(done.stdout.strip().splitlines()[-1]))


def main(asked: str) -> None:
    """Entry point of the process: build, measure, print one line of JSON."""
    spec = json.loads(asked)
    if spec["threads"] is not None:
        import torch

        torch.set_num_threads(spec["threads"])
    module, _, name = spec["function"].partition(":")
    work = getattr(importlib.import_module(module), name)(**spec["arguments"])
    before = _reset_peak()
    began = time.perf_counter()
    value = work()
    seconds = time.perf_counter() - began
    peak = None if before is None else _status("VmHWM")
    extra = None if before is None or peak is None else max(0, peak - before)
    print(json.dumps({"seconds": seconds, "extra_bytes": extra, "rss_bytes": peak, "value": value}))


def _reset_peak() -> int | None:
    """Forget the highest memory so far; returns the present one, or None where the system has no such thing."""
    try:
        (_PROC / "clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
