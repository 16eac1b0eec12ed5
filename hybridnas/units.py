"""Counts and bytes as people read them."""

from __future__ import annotations


def human(value: float | None) -> str:
    """Write a count in three figures and a suffix: 26,288,128 is 26.3M; nothing for None."""
    if value is None:
        return ""
    for suffix in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or suffix == "T":
            digits = f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
            return digits + suffix
        value /= 1000
    raise AssertionError("unreachable")


def several(count: int | None, noun: str) -> str:
    """Write a count with its noun, whose plural has an s: ``1 thread``, ``2 threads``, ``1,000 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def percent(share: float | None) -> str:
    """Write a share in per cent with one decimal: 0.0762 is 7.6 %; nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float | None) -> str:
    """Write a time in the largest fitting unit: 80 is 80 s, 200 is 3 min, 7,000 is 1.9 h; nothing for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def human_bytes(value: float | None) -> str:
    """Write a number of bytes in three figures: 1,572,864 is 1.5 MiB; nothing for None."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
