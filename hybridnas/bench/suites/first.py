"""What the first call of the scan costs: compiled, from the cache of another process, and the calls after it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

from hybridnas.bench import child
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread
from hybridnas.bench.result import Result, Table, seconds_text


def work() -> Callable[[], dict[str, float | str]]:
    """Import torch and draw inputs; returns what times a first and a second call, forward and backward."""
    from hybridnas.bench.suites import scan
    from hybridnas.kernels.selective_scan import describe

    inputs = scan.Inputs.draw(1, 64, 64, 16)

    def measured() -> dict[str, float | str]:
        at = [time.perf_counter()]
        for _ in range(2):
            scan.forward_backward(scan.ours, inputs)
            at.append(time.perf_counter())
        return {"first": at[1] - at[0], "second": at[2] - at[1], "words": describe("cpu")}

    return measured


def run(config: BenchConfig) -> Result:
    """Measure with an empty cache and with the one that this leaves, each in a process of its own."""
    result = Result("first")
    found: dict[str, list[float]] = {"nothing cached": [], "cached": []}
    calls: list[float] = []
    words: dict[str, str] = {}
    for _ in range(config.pick(5, 2, 1)):
        with tempfile.TemporaryDirectory(prefix="hybridnas-bench-") as cache:
            for name, seconds in found.items():
                variables = {"HYBRIDNAS_CACHE": cache}
                one = child.measured(f"{__name__}:work", {}, threads=config.threads, variables=variables)
                if one.failed:
                    words[name] = one.failed
                    continue
                seconds.append(one.value["first"])
                calls.append(one.value["second"])
                words[name] = one.value["words"]
    rows = [
        [name, seconds_text(Spread.of(seconds).median) if seconds else None, words.get(name, "")]
        for name, seconds in {**found, "the call after it": calls}.items()
    ]
    result.tables.append(Table("first: forward and backward of a small scan", ("cache", "median", "what runs"), rows))
    return result
