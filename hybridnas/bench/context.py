"""How a run of the benchmarks is asked for, and where it ran: settings, command, commit, machine, versions."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridnas.bench import peers
from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError

# name -> what it measures; one file each in bench/suites, with ``run(config) -> Result``
SUITES: dict[str, str] = {
    "scan": "the selective scan, forward and backward, against mambapy, Hugging Face and its arithmetic",
    "first": "the first call of the scan, compiled and from the cache",
    "memory": "peak memory of the scan against its inputs, outputs and gradients",
    "conv": "causal convolution with SiLU against F.conv1d",
    "delta": "gated delta rules, forward and backward, against Hugging Face and attention",
    "moe": "routed experts against a dense MLP of equal active FLOPs, and against Hugging Face",
    "step": "a training step against a Transformer, Hugging Face's Mamba and its own matrix products",
    "packed": "a training step with packed documents kept apart, against the same as one stream",
    "stacked": "models of one shape trained together by vmap, against one after another",
    "mixers": "every mixer in turn with an MLP: a training step and a token, beside attention and transformers",
    "decode": "one token at a time against Hugging Face's generate, after short and long contexts",
    "tasks": "batches of the synthetic tasks against the training step that reads them",
    "long": "a million tokens in one pass: seconds and memory",
    "lengths": "time and memory of training and decoding against sequence length, drawn",
    "roofline": "bytes and FLOPs of the Triton kernels and what GPUs would need for them: calculated, not measured",
    "gpu": "the Triton kernels on this machine's GPU against mamba-ssm, flash-linear-attention and torch",
    "samplers": "searches on a table: which sampler and pruner find the best architectures for the fewest tokens",
    "coverage": "simulated studies: how often intervals hold the truth, and how often a claim is false",
    "fleet": "decisions of a search with many trials, operations of its storage, and workers on PostgreSQL",
    "fidelity": "rank correlation between early and full scores, on a table",
    "history": "mixers from S4D to RWKV-7: a training step beside Mamba and attention at the lengths of the goals",
    "coordinates": "sizes of activations and of updates against width, for every letter, with and without muP",
    "decisions": "how often cheap comparisons decide as the truth set does, by policy and compute",
    "interop": "patterns by formats of transformers: which hold them, and the error of reloaded logits",
    "grafting": "what grafts of small models recover of the loss, by the start of new blocks; half an hour",
    "table": "builds a space's table, every architecture trained; hours, so never part of all",
    "verdicts": "the same search with several seeds: winners, claims, times; an hour or more, so never part of all",
    "truth": "trains the truth set, by which the accuracy of budgets is measured; many hours, so never part of all",
}

LONG = ("grafting", "table", "truth", "verdicts")  # suites that take hours: never part of suite=all

# environment variables that change what is measured
_TELLING = (
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "MKL_NUM_THREADS"),
    *("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"),
)
_ROOT = Path(__file__).resolve().parents[2]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


@dataclass(frozen=True, kw_only=True)
class BenchConfig(FrozenConfig):
    """Settings of the command."""

    suite: str = option("all", f"which suites: all, or names joined by ',': {', '.join(SUITES)}")
    out: Path | None = option(None, "JSON file for everything that was measured; plots lie beside it")
    quick: bool = option(False, "fewer rounds, and slow peers at shorter lengths")
    threads: int | None = option(None, "threads of every form; none: torch's own number [count]", ge=1)
    tiny: bool = option(False, "shapes so small that figures mean nothing: a check that every suite runs")
    keep_memory: bool = option(True, "let malloc keep freed memory, which favours peers that allocate much")
    patience: float = option(120.0, "a process that measures one length is ended after this time [s]", gt=0)

    space: str | None = option(
        None,
        "samplers, fidelity, table: the space whose table is read or built, none: tabular; verdicts: the space "
        "that is searched, none: mamba_moe [name]",
    )
    repeats: int | None = option(
        None,
        "samplers: searches of a pair, none: 100; coverage: studies, none: 2,000; verdicts: seeds, none: 10 [count]",
        ge=1,
    )
    budget: str = option("laptop", "verdicts: the budget of the searches [name]")
    part: str = option("0/1", "table: which share of the trainings this process takes, as INDEX/COUNT")
    minutes: float | None = option(
        None,
        "table: no training starts that would end later; truth, grafting: stop then, to go on; none: no limit",
        gt=0,
    )
    truth: Path = option(Path("experiments/results/truth.csv"), "truth, decisions: the truth set's rows [path]")
    sizes: tuple[int, ...] = option((), "truth: active parameters of the sizes to train; none: all [counts]", ge=1)
    patterns: tuple[str, ...] = option(
        (), "truth: train these instead of the listed architectures, into a file of their own [pattern strings]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out is not None and self.out.suffix != ".json":
            raise ConfigError(
                f"bench out={str(self.out)!r} is a JSON file; give it a name that ends in .json",
                field="out",
                got=str(self.out),
                allowed="*.json",
            )

    @classmethod
    def label(cls) -> str:
        return "bench"

    def pick(self, full: Any, quick: Any, tiny: Any) -> Any:
        """Return the value for this size of run."""
        return tiny if self.tiny else quick if self.quick else full

    def beside(self, suffix: str) -> Path | None:
        """Return a file beside ``out``: results.json and '-lengths.svg' make results-lengths.svg."""
        return None if self.out is None else self.out.with_name(self.out.stem + suffix)


def provenance(argv: list[str], threads: int | None = None) -> dict[str, Any]:
    """Return command, commit, machine and versions, for a result file; ``threads`` where the command sets them."""
    import torch

    from hybridnas.hardware import describe_machine

    commit, dirty = _commit()
    return {
        "command": " ".join(["python -m hybridnas.bench", *argv]),
        "commit": commit,
        "changed_since_commit": dirty,
        "machine": {
            "words": describe_machine(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads or torch.get_num_threads(),
            "memory_bytes": _memory(),
            "environment": {name: os.environ[name] for name in _TELLING if name in os.environ},
        },
        "versions": {
            "hybridnas": _version("hybridnas"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            **peers.versions(),
        },
    }


def keep_freed_memory() -> bool:
    """Tell glibc's malloc not to give memory back; returns whether it took that.

    A fresh tensor of 64 MiB costs its page faults, many times the arithmetic on it; whoever allocates much is measured
    without them.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError, TypeError):  # not glibc
        return False


def release_memory() -> None:
    """Give back what malloc has kept, between suites."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout that this package is imported from, and whether its files differ from it."""
    if not (_ROOT / ".git").exists():
        return None, None
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "--", "hybridnas"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return f"not installed, imported from a folder by Python {sys.version_info.major}"
