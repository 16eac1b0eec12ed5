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


def human_bytes(value: float | None) -> str:
    """Write a number of bytes in three figures: 1,572,864 is 1.5 MiB; nothing for None."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1000 or unit == "GiB":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")
