"""What GPUs would need for the Triton kernels if nothing but memory and arithmetic counted: calculated, not measured.

Bytes and operations are those of ``kernels/_triton/traffic.py``. The time is the larger of bytes / bandwidth and
operations / peak of plain float32, without launches, latency or partial waves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.kernels._triton import traffic

LABEL = "calculated, not measured"


class Gpu(NamedTuple):
    """Peaks as the maker's data sheets print them."""

    name: str
    bytes_per_second: float
    flops_per_second: float  # float32, not on tensor cores


GPUS = (
    Gpu("A100 40GB", 1555e9, 19.5e12),
    Gpu("A100 80GB", 2039e9, 19.5e12),
    Gpu("H100 SXM", 3350e9, 66.9e12),
)
# case, function of traffic, its arguments
_CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("scan (1,1024,1024,16) float32", "scan_traffic", {"batch": 1, "length": 1024, "channels": 1024, "size": 16}),
    ("scan (8,2048,2048,16) float32", "scan_traffic", {"batch": 8, "length": 2048, "channels": 2048, "size": 16}),
    (
        "scan (8,2048,2048,16) bfloat16",
        "scan_traffic",
        {"batch": 8, "length": 2048, "channels": 2048, "size": 16, "dtype_bytes": 2},
    ),
    ("conv (8,2048,2048) float32", "conv_traffic", {"batch": 8, "length": 2048, "channels": 2048, "taps": 4}),
    (
        "conv (8,2048,2048) bfloat16",
        "conv_traffic",
        {"batch": 8, "length": 2048, "channels": 2048, "taps": 4, "dtype_bytes": 2},
    ),
)


def run(config: BenchConfig) -> Result:
    """Tabulate every kernel at the goals' shape and at one that fills a GPU."""
    result = Result("roofline")
    rows: list[list[Any]] = []
    for case, function, arguments in _CASES[:1] if config.tiny else _CASES:
        kernels: dict[str, traffic.Traffic] = getattr(traffic, function)(**arguments)
        own = [_row(case, name, counted) for name, counted in kernels.items()]
        rows += [*own, _total(case, own)]
    columns = ("case", "kernel", "MB", "MFLOP", "FLOP per byte", *(f"{gpu.name} [us]" for gpu in GPUS))
    result.tables.append(Table(f"roofline: {LABEL}", columns, rows))
    words = ", ".join(
        f"{g.name} {g.bytes_per_second / 1e9:g} GB/s and {g.flops_per_second / 1e12:g} TFLOP/s" for g in GPUS
    )
    result.notes.append(f"{LABEL}: no GPU ran anything for this table; peaks: {words} (float32)")
    return result


def _total(case: str, rows: list[list[Any]]) -> list[Any]:
    """Return one after another: what is moved, done and waited for adds up."""
    megabytes, megaflops, *times = (sum(row[i] for row in rows) for i in (2, 3, 5, 6, 7))
    return [case, "all, one after another", megabytes, megaflops, megaflops / megabytes, *times]


def _row(case: str, name: str, counted: traffic.Traffic) -> list[Any]:
    times = [1e6 * counted.seconds(gpu.bytes_per_second, gpu.flops_per_second) for gpu in GPUS]
    intensity = counted.flops / counted.bytes if counted.bytes else None
    return [case, name, counted.bytes / 1e6, counted.flops / 1e6, intensity, *times]
