"""Load of the whole machine, read from ``/proc`` at a measurement: the metrics that MLflow calls system metrics.

Reading them costs well below a millisecond. On systems without ``/proc`` (macOS, Windows) there are none.
"""

from __future__ import annotations

from pathlib import Path

_STAT, _MEMORY = Path("/proc/stat"), Path("/proc/meminfo")


class SystemMetrics:
    """Samples processor and memory; the names are those under which MLflow shows them on a page of their own."""

    def __init__(self) -> None:
        self._before = _processor()

    def sample(self) -> dict[str, float]:
        """Return the share of processor time in use since the last sample [%], and memory in use [MB, %]."""
        found: dict[str, float] = {}
        before, now = self._before, _processor()
        self._before = now
        if before is not None and now is not None and now[1] > before[1]:
            busy = (now[0] - before[0]) / (now[1] - before[1])
            found["system/cpu_utilization_percentage"] = round(100 * busy, 1)
        memory = _memory()
        if memory is not None:
            used, total = memory
            found["system/system_memory_usage_megabytes"] = round(used / 1e3, 1)
            found["system/system_memory_usage_percentage"] = round(100 * used / total, 1)
        return found


def _processor() -> tuple[int, int] | None:
    """Return processor time in use and in all since the machine started [ticks]."""
    try:
        user, nice, system, idle, wait, *others = map(int, _STAT.read_text().splitlines()[0].split()[1:9])
    except (OSError, ValueError, IndexError):
        return None
    total = user + nice + system + idle + wait + sum(others)
    return total - idle - wait, total


def _memory() -> tuple[int, int] | None:
    """Return memory in use and in all [kB]."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        total, free = (int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return total - free, total
