"""Choice of the implementation of an operation, by device, dtypes and sizes; imports no triton.

Each operation's package has one :class:`Operation`, which says what implementations it has. ``choose`` is called at
every call of the operation, ``describe`` prints what it would choose.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import NamedTuple

import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.hardware import Impl
from hybridnas.kernels._build import Library

_TRITON_INSTALLED = find_spec("triton") is not None  # it has no wheel for macOS and Windows
_FLA_INSTALLED = find_spec("fla") is not None
_TRITON_CAPABILITY = (8, 0)  # of NVIDIA's Ampere, the oldest that Triton supports and these kernels were compiled for
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Operation(NamedTuple):
    """The implementations of an operation besides ``reference`` and ``torch``, which every one has on any device."""

    name: str
    eager: str  # what the torch form is made of, for ``describe``
    native: Callable[[], Library] | None = None  # compiles the C form at first use
    native_available: Callable[[], bool] | None = None  # the same as a constant, for torch.compile
    native_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)  # it sums in float32
    triton: bool = False
    triton_dtypes: tuple[torch.dtype, ...] = _TRITON_DTYPES
    auto_triton: bool = True  # whether auto takes Triton on a CUDA device
    fla: bool = False  # whether flash-linear-attention has it

    def choose(
        self,
        impl: str | Impl,
        device: torch.device,
        dtypes: tuple[torch.dtype, ...],
        *,
        native_limit: str = "",
        triton_limit: str = "",
        fla_limit: str = "",
    ) -> Impl:
        """Return the implementation that runs on tensors of these dtypes on ``device``.

        ``native_limit``, ``triton_limit`` and ``fla_limit`` say which size the C, the Triton and the borrowed form do
        not take, or are empty. auto is Triton on a CUDA device and C on a CPU where they take the inputs, else torch.
        Raises KernelUnavailableError where a named implementation cannot run, ConfigError for an unknown name.
        """
        wanted = impl if type(impl) is Impl else Impl.of(impl)
        limits = {Impl.NATIVE: native_limit, Impl.TRITON: triton_limit, Impl.FLA: fla_limit}
        if wanted is Impl.AUTO:
            best = self._best(device.type)
            return Impl.TORCH if self._refusal(best, device, dtypes, limits.get(best, "")) else best
        reason = self._refusal(wanted, device, dtypes, limits.get(wanted, ""))
        if reason:
            runs = [
                member.value for member in Impl if not self._refusal(member, device, dtypes, limits.get(member, ""))
            ]
            raise KernelUnavailableError(
                f"{self.name} impl={wanted.value!r} {reason}; use impl='auto'",
                field="impl",
                got=wanted.value,
                allowed=runs,
            )
        return wanted

    def nearest(self, impl: str | Impl) -> Impl:
        """Return ``impl`` where this operation has that form on any device, else auto.

        A model hands one implementation to all of its operations, of which some have no C and others no Triton form;
        those choose by themselves, as ``describe`` says.
        """
        wanted = Impl.of(impl)
        missing = {Impl.NATIVE: self.native is None, Impl.TRITON: not self.triton, Impl.FLA: not self.fla}
        return Impl.AUTO if missing.get(wanted, False) else wanted

    def describe(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, impl: str | Impl = Impl.AUTO
    ) -> str:
        """Return which implementation ``choose`` takes for tensors of ``dtype`` on ``device``, and how it computes.

        Raises as ``choose`` does.
        """
        device = torch.device(device)
        chosen = self.choose(impl, device, (dtype,))
        if chosen is Impl.REFERENCE:
            return "reference: step by step"
        if chosen is Impl.NATIVE and self.native is not None:
            return f"native: {self.native().description}"
        if chosen is Impl.TRITON:
            return "triton: tuned at the first call, the choice is cached"
        if chosen is Impl.FLA:
            return "fla: flash-linear-attention's kernels"
        best = self._best(device.type)
        reason = "" if Impl.of(impl) is Impl.TORCH else self._refusal(best, device, (dtype,))
        return f"torch: {self.eager}" + (f" ({best.value} {reason})" if reason else "")

    def _best(self, device: str) -> Impl:
        if device == "cuda":
            return Impl.TRITON if self.triton and self.auto_triton else Impl.TORCH
        return Impl.NATIVE if device == "cpu" and self.native is not None else Impl.TORCH

    def _refusal(self, impl: Impl, device: torch.device, dtypes: tuple[torch.dtype, ...], limit: str = "") -> str:
        """Return why an implementation cannot run, or an empty string."""
        if impl is Impl.NATIVE:
            if self.native is None or self.native_available is None:
                return "does not exist: this operation has no C form"
            if device.type != "cpu":
                return f"needs tensors on a CPU, got {device.type!r}"
            wrong = [d for d in dtypes if d not in self.native_dtypes]
            if wrong:
                return f"takes {_names(self.native_dtypes)}, got {_names(wrong)}"
            return limit if self.native_available() else f"is not compiled: {self.native().description}"
        if impl is Impl.TRITON:
            if not self.triton:
                return "does not exist: this operation has no Triton form"
            if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return _needs_cuda(device)
            if not _TRITON_INSTALLED:
                return "needs the package triton, which is not installed"
            old: str = _too_old(device) if device.type == "cuda" else ""
            if old:
                return old
            wrong = [d for d in dtypes if d not in self.triton_dtypes]
            return f"takes {_names(self.triton_dtypes)}, got {_names(wrong)}" if wrong else limit
        if impl is Impl.FLA:
            if not self.fla:
                return "does not exist: flash-linear-attention does not have this operation"
            if device.type != "cuda":
                return _needs_cuda(device)
            return limit if _FLA_INSTALLED else "needs the package flash-linear-attention: pip install hybridnas[fla]"
        return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _too_old(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on a CUDA device, or an empty string."""
    if torch.version.hip is not None or not torch.cuda.is_available():  # none here: what is asked about is far away
        return ""
    found = torch.cuda.get_device_capability(device)
    if found >= _TRITON_CAPABILITY:
        return ""
    needed, got = (".".join(map(str, one)) for one in (_TRITON_CAPABILITY, found))
    return f"needs a GPU of compute capability {needed} or more, {torch.cuda.get_device_name(device)} has {got}"


def _needs_cuda(device: torch.device) -> str:
    here = f"this tensor is on {device.type!r}" if torch.cuda.is_available() else "this machine has none"
    return f"needs a CUDA device, {here}"


def dtypes_of(*tensors: torch.Tensor | None) -> tuple[torch.dtype, ...]:
    """Return the dtypes of the tensors that are given."""
    return tuple([t.dtype for t in tensors if t is not None])


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))
