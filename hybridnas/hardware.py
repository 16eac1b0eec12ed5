"""Which device and which implementation run: decided once, said in words."""

from __future__ import annotations

import os
import platform
from enum import Enum
from typing import TYPE_CHECKING

from hybridnas.errors import ConfigError, KernelUnavailableError

if TYPE_CHECKING:
    import torch


class Impl(str, Enum):
    """Who computes an operation. ``auto`` decides by device at build; any other runs or raises."""

    AUTO = "auto"
    REFERENCE = "reference"  # the plain recurrence: the specification, slow
    CPU = "cpu"  # the fast path on a processor
    TRITON = "triton"  # the fast path on a CUDA device

    @classmethod
    def of(cls, value: str | Impl) -> Impl:
        """Return the member for a name, or raise ConfigError that lists them."""
        try:
            return cls(value)
        except ValueError:
            raise ConfigError(f"impl={value!r} must be one of {', '.join(m.value for m in cls)}") from None


def resolve_impl(impl: str | Impl, device: torch.device, operation: str) -> Impl:
    """Return the implementation that runs ``operation`` on ``device``; a requested one is kept or refused."""
    wanted = Impl.of(impl)
    if wanted is Impl.AUTO:
        return Impl.TRITON if device.type == "cuda" else Impl.CPU
    if wanted is Impl.TRITON and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        import torch

        here = f"this tensor is on {device.type!r}" if torch.cuda.is_available() else "this machine has none"
        raise KernelUnavailableError(f"{operation} impl='triton' needs a CUDA device, {here}; use impl='cpu'")
    return wanted


def pick_device(wanted: str = "auto") -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; raises ConfigError when it is absent."""
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device={wanted!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={wanted!r} does not train models; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={wanted!r} needs CUDA, this machine has none; use device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={wanted!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def describe_machine() -> str:
    """Return one line for logs and result files: system, processor count, threads, torch version."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{accelerator}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
