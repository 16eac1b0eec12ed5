"""Benchmarks: every goal of this project measured side by side with the peers that are installed.

``python -m hybridnas.bench`` runs all suites, ``python -m hybridnas.bench scan`` one. A suite is a file in ``suites/``
with ``run(config) -> Result``, and one line in the table below.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable

from hybridnas.bench.context import BenchConfig, keep_freed_memory, release_memory
from hybridnas.bench.result import Result
from hybridnas.errors import ConfigError, suggest

SUITES: dict[str, str] = {
    "scan": "the selective scan, forward and backward, against mambapy, Hugging Face and its arithmetic",
    "first": "the first call of the scan, compiled and from the cache",
    "memory": "peak memory of the scan against its inputs, outputs and gradients",
    "conv": "causal convolution with SiLU against F.conv1d",
    "moe": "routed experts against a dense MLP of equal active FLOPs, and against Hugging Face",
    "step": "a training step against a Transformer, Hugging Face's Mamba and its own matrix products",
    "decode": "one token at a time against Hugging Face's generate, after short and long contexts",
    "tasks": "batches of the synthetic tasks against the training step that reads them",
    "long": "a million tokens in one pass: seconds and memory",
    "lengths": "time and memory of training and decoding against sequence length, drawn",
    "roofline": "bytes and FLOPs of the Triton kernels and what GPUs would need for them: calculated, not measured",
    "gpu": "the Triton kernels on this machine's GPU against mamba-ssm, flash-linear-attention and torch",
    "samplers": "searches on a table: which sampler and pruner find the best architectures for the fewest tokens",
    "fidelity": "rank correlation between early and full scores, on a table",
    "table": "builds a space's table, every architecture trained; hours, so never part of all",
}


def chosen(names: str) -> list[str]:
    """Return the suites that ``suite=`` names; raises ConfigError for an unknown one."""
    if names == "all":
        return [name for name in SUITES if name != "table"]
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in SUITES:
            raise ConfigError(f"bench suite={name!r} is unknown{suggest(name, [*SUITES, 'all'])}")
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
