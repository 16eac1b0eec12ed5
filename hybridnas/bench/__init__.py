"""Benchmarks: every goal of this project measured beside other packages that are installed.

``python -m hybridnas.bench`` runs all suites, ``python -m hybridnas.bench scan`` one. A suite is a file in ``suites/``
with ``run(config) -> Result``, and one line in the table below.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from hybridnas.bench.context import LONG, SUITES, BenchConfig, keep_freed_memory, release_memory
from hybridnas.bench.result import Result
from hybridnas.errors import ConfigError, suggest


def chosen(names: str) -> list[str]:
    """Return the suites that ``suite=`` names; raises ConfigError for an unknown one."""
    if names == "all":
        return [name for name in SUITES if name not in LONG]
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in SUITES:
            raise ConfigError(
                f"bench suite={name!r} is unknown{suggest(name, [*SUITES, 'all'])}",
                field="suite",
                got=name,
                allowed=(*SUITES, "all"),
            )
    return asked


def run(config: BenchConfig, on_result: Callable[[Result], None] | None = None) -> list[Result]:
    """Run the suites that ``config`` asks for, one after another; ``on_result`` sees each when it is done."""
    import torch

    names = chosen(config.suite)
    before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    kept = config.keep_memory and keep_freed_memory()
    results = []
    try:
        for name in names:
            suite: Callable[[BenchConfig], Result] = importlib.import_module(f"hybridnas.bench.suites.{name}").run
            began = time.perf_counter()
            result = suite(config)
            result.seconds = time.perf_counter() - began
            if config.tiny:  # a ratio at such shapes says nothing about a goal
                result.goals = [goal._replace(met=None, note=goal.note or "tiny shapes") for goal in result.goals]
            if kept and result.timed:
                result.notes.append("malloc keeps freed memory (mallopt), in favour of forms that allocate much")
            release_memory()
            results.append(result)
            if on_result is not None:
                on_result(result)
    finally:
        torch.set_num_threads(before)
    return results
