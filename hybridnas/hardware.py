"""Implementations, devices, and a description of this machine."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.errors import ConfigError
from hybridnas.units import several

if TYPE_CHECKING:
    import torch

# Of glibc, malloc.h: mallopt's parameters, and what they are set to [bytes].
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 512 << 20  # free memory that stays with the process
_LARGEST_KEPT = 32 << 20  # the largest block that is taken from it: glibc accepts no more

_SHORT_WAITS = "1000"  # of GOMP_SPINCOUNT
# An OpenMP thread that waits for its partner spins, by default for milliseconds: beside any other load, small models
# trained 25 times slower. A short spin costs nothing on a quiet machine. The count is read when torch is imported.
LONG_WAITS = "torch" in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
os.environ.setdefault("GOMP_SPINCOUNT", _SHORT_WAITS)


class Impl(str, Enum):
    """Which implementation computes an operation.

    ``auto`` chooses at every call by device, dtype, sizes and what is installed. Any other one runs, or raises
    KernelUnavailableError where it cannot: nothing falls back to another implementation silently.
    """

    AUTO = "auto"
    REFERENCE = "reference"  # the specification in plain torch, step by step: slow, on any device
    TORCH = "torch"  # vectorized torch operations, on any device
    NATIVE = "native"  # compiled C, on a CPU
    TRITON = "triton"  # Triton kernels, on a CUDA device
    FLA = "fla"  # the package flash-linear-attention, on a CUDA device, where it has the operation; never auto's choice

    @classmethod
    def of(cls, value: str | Impl) -> Impl:
        """Return the member of this name, or raise ConfigError that lists them."""
        try:
            return cls(value)
        except ValueError:
            names = [member.value for member in cls]
            message = f"impl={value!r} must be one of {', '.join(names)}"
            raise ConfigError(message, field="impl", got=value, allowed=names) from None


def pick_device(wanted: str = "auto") -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; raises ConfigError when it is absent."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def refused(why: str, *allowed: str) -> ConfigError:
        return ConfigError(f"device={wanted!r} {why}", field="device", got=wanted, allowed=list(allowed))

    kinds = ("auto", "cpu", "cuda", "cuda:N")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise refused("is not a device; use auto, cpu, cuda or cuda:N", *kinds) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise refused("does not train models; use auto, cpu, cuda or cuda:N", *kinds)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise refused(f"needs CUDA, {_why_no_cuda()}; use device=cpu", "auto", "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise refused(f"is not there: this machine has {count} CUDA devices", *(f"cuda:{i}" for i in range(count)))
    return device


def _why_no_cuda() -> str:
    """Return why torch finds no CUDA device: a GPU that is there may have a driver or a torch that do not fit it."""
    import torch

    if not Path("/proc/driver/nvidia/version").exists():
        return "this machine has none"
    if torch.version.cuda is None:
        return f"and this machine's GPU cannot be reached by torch {torch.__version__}, which was built without it"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # a driver older than torch's CUDA, for example
        said = " ".join(str(error).split()).partition(". ")[0]
        return f"and torch {torch.__version__} with CUDA {torch.version.cuda} cannot use this machine's: {said}"
    return "this machine has none"


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones; does nothing where it is not glibc.

    A training step takes the blocks that the step before has freed. By default glibc gives them back to the system in
    between, which has to clear every page again: a seventh of the time of a small step, in 1,900 page faults. Up to
    512 MiB of free memory stay with the process. Left alone where the environment tunes malloc itself.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or tuned:
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def describe_machine() -> str:
    """Return one line for logs and result files: system, processor count, threads, torch version."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.system()} {platform.machine()}, {several(os.cpu_count(), 'core')}, "
        f"{several(torch.get_num_threads(), 'thread')}, "
        f"{accelerator}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
