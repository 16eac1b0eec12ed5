"""How a kernel is launched: on a GPU with the tile that ran fastest there, remembered on disk; else with a given one.

The tuner is Triton's own. Its choice per kernel, dtypes and sizes lies in Triton's cache folder (``TRITON_CACHE_DIR``,
by default ``~/.triton/cache``) under a key of kernel source, compiler and device, so that it is measured once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from hybridnas.kernels._triton.shapes import MAX_CHUNK

# what a compiled kernel is launched with besides its tile; Triton warns where the first is left to its default
OPTIONS = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """One choice of the tuner: constants of a kernel, warps, and the registers a thread may use on NVIDIA."""

    constants: tuple[tuple[str, int], ...]
    warps: int
    registers: int | None = None

    @classmethod
    def of(cls, warps: int, registers: int | None = None, **constants: int) -> Tile:
        return cls(tuple(constants.items()), warps, registers)

    def options(self, nvidia: bool) -> dict[str, Any]:
        """Return the compiler's options of this tile."""
        return {"num_warps": self.warps} | ({"maxnreg": self.registers} if nvidia and self.registers else {})

    @property
    def label(self) -> str:
        """The constants and warps, as the report prints them."""
        return " ".join([*(f"{name}={value}" for name, value in self.constants), f"warps={self.warps}"])


class Launch(NamedTuple):
    """A requested launch: which kernel, the tiles to choose from, the other arguments, and the tuner's key."""

    kernel: Any
    tiles: tuple[Tile, ...]
    arguments: dict[str, Any]
    key: tuple[str, ...] = ()


class _Recording(threading.local):
    """The list that launches of this thread go to instead of a GPU; None: they are made."""

    launches: list[Launch] | None = None


_recording = _Recording()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect this thread's launches instead of making them: on the meta device, what a call would compile."""
    outer = _recording.launches
    found: list[Launch] = []
    _recording.launches = found
    try:
        yield found
    finally:
        _recording.launches = outer


@cache
def _tuner(kernel: Any, tiles: tuple[Tile, ...], key: tuple[str, ...]) -> Any:
    nvidia = torch.version.hip is None
    configs = [triton.Config(dict(tile.constants), **tile.options(nvidia)) for tile in tiles]
    return triton.autotune(configs=configs, key=list(key), cache_results=True)(kernel)


def launch(
    kernel: Any,
    programs: Callable[[dict[str, int]], int | tuple[int, ...]],
    tiles: Sequence[Tile],
    key: tuple[str, ...],
    device: torch.device,
    **arguments: Any,
) -> None:
    """Run ``kernel`` with the fastest of ``tiles`` on this device, on ``programs(constants of the tile)`` programs.

    A single tile is taken as it is; so is the first one under the interpreter, where there is no device to tune on.
    ``key`` names the arguments whose values, besides all dtypes, make another measurement.
    """
    if _recording.launches is not None:
        _recording.launches.append(Launch(kernel, tuple(tiles), arguments, key))
        return
    if 0 in _grid(programs(dict(tiles[0].constants))):
        return  # nothing to do, which a GPU would refuse
    if "PRECISION" in kernel.arg_names:
        arguments["PRECISION"] = precision(device.type == "cuda" and torch.version.hip is None)
    if device.type != "cuda":
        kernel[_grid(programs(dict(tiles[0].constants)))](**arguments, **dict(tiles[0].constants))
        return
    with torch.cuda.device(device) if device.index is not None else nullcontext():
        if len(tiles) == 1:
            constants = dict(tiles[0].constants)
            options = tiles[0].options(torch.version.hip is None) | OPTIONS
            kernel[_grid(programs(constants))](**arguments, **constants, **options)
        else:
            _tuner(kernel, tuple(tiles), key)[lambda meta: _grid(programs(meta))](**arguments, **OPTIONS)


def _grid(programs: int | tuple[int, ...]) -> tuple[int, ...]:
    return programs if isinstance(programs, tuple) else (programs,)


def precision(nvidia: bool) -> str:
    """Return how float32 matrices are multiplied: on NVIDIA as three TF32 products, within a few float32 roundings.

    With torch.backends.cuda.matmul.fp32_precision set to TF32, as one. AMD multiplies float32 itself.
    """
    if not nvidia:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def operand_dtype(*tensors: torch.Tensor) -> Any:
    """Return the dtype that matrix products read these tensors in, as Triton calls it: that of half precision, if all
    share it, else float32, also for bfloat16 in the interpreter, which multiplies it wrongly and says nothing.
    """
    (dtype, *others) = {t.dtype for t in tensors}
    if others or dtype == torch.float32 or (dtype == torch.bfloat16 and knobs.runtime.interpret):
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def near_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return (B, L, X) with X contiguous and steps of L that stay within 32 bits over a chunk, copied only if not."""
    fits = (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) and 0 <= tensor.stride(1) * MAX_CHUNK < 2**31
    return tensor if fits else tensor.contiguous()
