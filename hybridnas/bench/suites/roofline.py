"""What GPUs would need for the Triton kernels if nothing but memory and arithmetic counted: calculated, not measured.

Bytes and operations are those of ``bench/triton/traffic.py``. The time is the larger of bytes / bandwidth and
operations / peak (of the tensor cores for kernels of matrix products, else of plain float32), without launches,
latency or partial waves.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.bench.triton import traffic

LABEL = "calculated, not measured"


class Gpu(NamedTuple):
    """Peaks as the maker's data sheets print them."""

    name: str
    bytes_per_second: float
    flops_per_second: float  # float32, not on tensor cores
    products_per_second: tuple[float, float]  # of matrices, dense, on tensor cores: float32 by three TF32, bfloat16


GPUS = (
    Gpu("A100 40GB", 1555e9, 19.5e12, (156e12 / 3, 312e12)),
    Gpu("A100 80GB", 2039e9, 19.5e12, (156e12 / 3, 312e12)),
    Gpu("H100 SXM", 3350e9, 66.9e12, (494.7e12 / 3, 989.4e12)),
)
_BIG = {"batch": 8, "length": 2048, "channels": 2048}
_HEADS = {"batch": 8, "length": 2048, "heads": 32, "width": 64, "groups": 1, "size": 128}
_EXPERTS = {"tokens": 16384, "choices": 1, "n_experts": 32, "width": 1024, "hidden": 3072}
# case, function of traffic, its arguments
_CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("scan (1,1024,1024,16) float32", "scan_traffic", {"batch": 1, "length": 1024, "channels": 1024, "size": 16}),
    ("scan (8,2048,2048,16) float32", "scan_traffic", _BIG | {"size": 16}),
    ("scan (8,2048,2048,16) bfloat16", "scan_traffic", _BIG | {"size": 16, "dtype_bytes": 2}),
    ("conv (8,2048,2048) float32", "conv_traffic", _BIG | {"taps": 4}),
    ("conv (8,2048,2048) bfloat16", "conv_traffic", _BIG | {"taps": 4, "dtype_bytes": 2}),
    ("ssd (8,2048,32,64,1,128) float32", "ssd_traffic", _HEADS),
    ("ssd (8,2048,32,64,1,128) bfloat16", "ssd_traffic", _HEADS | {"dtype_bytes": 2}),
    ("moe (16384,1,32,1024,3072) float32", "moe_traffic", _EXPERTS),
    ("moe (16384,1,32,1024,3072) bfloat16", "moe_traffic", _EXPERTS | {"dtype_bytes": 2}),
    ("rmsnorm (16384,1024) bfloat16", "norm_traffic", {"rows": 16384, "features": 1024, "dtype_bytes": 2}),
    (
        "add + layernorm (16384,1024) bfloat16",
        "norm_traffic",
        {"rows": 16384, "features": 1024, "dtype_bytes": 2, "centered": True, "fused": True},
    ),
    ("loss (16384,50257) bfloat16", "loss_traffic", {"rows": 16384, "vocabulary": 50257, "dtype_bytes": 2}),
)
_PRODUCTS = re.compile(r"grouped_(rows|weights)|ssd_(?!steps|pass|gate)")  # kernels whose work is matrix products


def run(config: BenchConfig) -> Result:
    """Tabulate every kernel at the goals' shape and at one that fills a GPU."""
    result = Result("roofline")
    rows: list[list[Any]] = []
    for case, function, arguments in _CASES[:1] if config.tiny else _CASES:
        kernels: dict[str, traffic.Traffic] = getattr(traffic, function)(**arguments)
        half = arguments.get("dtype_bytes", 4) == 2
        own = [_row(case, name, counted, half) for name, counted in kernels.items() if counted.bytes]
        rows += [*own, _total(case, own)]
    columns = ("case", "kernel", "MB", "MFLOP", "FLOP per byte", *(f"{gpu.name} [us]" for gpu in GPUS))
    result.tables.append(Table(f"roofline: {LABEL}", columns, rows))
    words = ", ".join(
        f"{g.name} {g.bytes_per_second / 1e9:g} GB/s, {g.flops_per_second / 1e12:g} TFLOP/s, of matrix products "
        f"{g.products_per_second[0] / 1e12:.3g} (float32) and {g.products_per_second[1] / 1e12:.4g} (bfloat16)"
        for g in GPUS
    )
    result.notes.append(f"{LABEL}: no GPU ran anything for this table; peaks: {words}")
    return result


def _total(case: str, rows: list[list[Any]]) -> list[Any]:
    """Return one after another: what is moved, done and waited for adds up."""
    megabytes, megaflops, *times = (sum(row[i] for row in rows) for i in (2, 3, 5, 6, 7))
    return [case, "all, one after another", megabytes, megaflops, megaflops / megabytes, *times]


def _row(case: str, name: str, counted: traffic.Traffic, half: bool) -> list[Any]:
    products = bool(_PRODUCTS.match(name))
    peaks = [gpu.products_per_second[half] if products else gpu.flops_per_second for gpu in GPUS]
    times = [1e6 * counted.seconds(gpu.bytes_per_second, peak) for gpu, peak in zip(GPUS, peaks, strict=True)]
    return [case, name, counted.bytes / 1e6, counted.flops / 1e6, counted.flops / counted.bytes, *times]
