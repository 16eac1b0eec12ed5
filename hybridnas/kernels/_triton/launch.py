"""How a kernel is launched: on a GPU with the tile that ran fastest there, remembered on disk; else with a given one.

The tuner is Triton's own. Its choice per kernel, dtypes and sizes lies in Triton's cache folder (``TRITON_CACHE_DIR``,
by default ``~/.triton/cache``) under a key of kernel source, compiler and device, so that it is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

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
    def words(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.constants), f"warps={self.warps}"])


class Launch(NamedTuple):
    """A launch that was asked for: which kernel, the tiles to choose from, and all other arguments by name."""

    kernel: Any
    tiles: tuple[Tile, ...]
    arguments: dict[str, Any]


_records: list[list[Launch]] = []


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of making them: with tensors on the meta device, what a call would compile."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


@cache
def _tuner(kernel: Any, tiles: tuple[Tile, ...], key: tuple[str, ...]) -> Any:
    nvidia = torch.version.hip is None
    configs = [triton.Config(dict(tile.constants), **tile.options(nvidia)) for tile in tiles]
    return triton.autotune(configs=configs, key=list(key), cache_results=True)(kernel)


def launch(
    kernel: Any,
    programs: Callable[[dict[str, int]], int],
    tiles: Sequence[Tile],
    key: tuple[str, ...],
    device: torch.device,
    **arguments: Any,
) -> None:
    """Run ``kernel`` on ``programs(constants of the tile)`` programs, with the fastest of ``tiles`` on this device.

    A single tile is taken as it is; so is the first one under the interpreter, where there is no device to tune on.
    ``key`` names the arguments whose values, besides all dtypes, make another measurement.
    """
    if _records:
        _records[-1].append(Launch(kernel, tuple(tiles), arguments))
        return
    if device.type != "cuda":
        kernel[(programs(dict(tiles[0].constants)),)](**arguments, **dict(tiles[0].constants))
        return
    with torch.cuda.device(device) if device.index is not None else nullcontext():
        if len(tiles) == 1:
            constants = dict(tiles[0].constants)
            options = tiles[0].options(torch.version.hip is None) | OPTIONS
            kernel[(programs(constants),)](**arguments, **constants, **options)
        else:
            _tuner(kernel, tuple(tiles), key)[lambda meta: (programs(meta),)](**arguments, **OPTIONS)


def near_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return (B, L, X) with X contiguous and steps of L that stay within 32 bits over a chunk, copied only if not."""
    fits = (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) and 0 <= tensor.stride(1) * 128 < 2**31
    return tensor if fits else tensor.contiguous()
