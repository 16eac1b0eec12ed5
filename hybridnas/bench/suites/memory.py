"""Peak memory of the scan, forward and backward, in a fresh process, against what it must hold anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hybridnas.bench import child
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites import scan

_MIB = 2**20


def work(batch: int, length: int, channels: int, size: int, form: str) -> Callable[[], dict[str, int]]:
    """Build inputs and warm up at a small size; returns the scan to measure, which returns bytes that must be there."""
    function = partial(scan.ours, impl="auto" if form == scan.OURS else "torch")
    small = scan.Inputs.draw(1, 2, 16, 2)
    scan.forward_backward(function, small)
    inputs = scan.Inputs.draw(batch, length, channels, size)

    def measured() -> dict[str, int]:
        scan.forward_backward(function, inputs)
        given = sum(t.nbytes for t in inputs)
        gradients = sum(t.nbytes for t in inputs[:-1])
        return {"inputs": given, "made": inputs.u_BLD.nbytes + gradients}

    return measured


def run(config: BenchConfig) -> Result:
    """Measure our forms at the goals' shapes: (inputs + peak beyond them) / (inputs + outputs + gradients)."""
    result = Result("memory")
    shapes = [(1, 16, 16, 4)] if config.tiny else [(1, 1024, 1024, 16), (8, 256, 256, 16)]
    rows = []
    for batch, channels, length, size in shapes:
        words = f"(B,D,L,N)=({batch},{channels},{length},{size})"
        for form in (scan.OURS, scan.CHUNKED):
            shape = {"batch": batch, "length": length, "channels": channels, "size": size}
            values, why, needed, peak = [], "", None, None
            for _ in range(config.pick(3, 2, 1)):
                one = child.measured(
                    "hybridnas.bench.suites.memory:work", {**shape, "form": form}, threads=config.threads
                )
                if one.failed or one.extra_bytes is None:
                    why = one.failed or "peak memory is read from /proc, which this system has not"
                    break
                needed = one.value["inputs"] + one.value["made"]
                peak = one.value["inputs"] + one.extra_bytes
                values.append(peak / needed)
            spread = Spread.of(values) if values else None
            rows.append([words, form, _mib(needed), _mib(peak), spread.median if spread else None, why])
            if form == scan.OURS:
                what = f"peak memory of scan {words} fwd+bwd"
                result.hold("at most", 1.3, spread, what=what, against="inputs + outputs + gradients", note=why)
    columns = ("case", "form", "inputs + outputs + gradients [MiB]", "peak [MiB]", "ratio", "note")
    result.tables.append(Table("memory: scan forward and backward, fresh process", columns, rows))
    return result


def _mib(value: int | None) -> float | None:
    return None if value is None else value / _MIB
