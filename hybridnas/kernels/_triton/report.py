"""Compile every Triton kernel for GPUs that need not be here, and print what each uses.

``python -m hybridnas.kernels._triton.report [whole=true] [targets=sm_80,sm_90,gfx942] [kernel=NAME] [jobs=N]
[timeout=SECONDS] [out=FILE]`` compiles the first tile of every kernel at common sizes, or with ``whole`` every tile
at every size class; ``kernel`` keeps those whose name contains it. The exit code is 1 where a kernel does not compile
in time, spills registers or needs more than the target has.
Nothing here runs a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.errors import ConfigError, suggest
from hybridnas.files import write_json
from hybridnas.kernels._triton.compiled import TARGETS, Compilation, Usage, usage
from hybridnas.kernels._triton.launch import Launch, recording
from hybridnas.kernels._triton.shapes import MAX_STATE, MAX_TAPS
from hybridnas.kernels.causal_conv1d import triton as conv
from hybridnas.kernels.selective_scan import triton as scan

_B, _L, _D = 2, 160, 256
_DEFAULTS = {"whole": "false", "targets": ",".join(TARGETS), "kernel": "", "jobs": "2", "timeout": "120", "out": ""}
_SIZES = [2**i for i in range(MAX_STATE.bit_length())]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scan_launches(size: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward scan would launch; ``full``: with every optional argument, else with none."""
    wide, narrow = _empty(_B, _L, _D, dtype=dtype), _empty(_B, _L, size, dtype=dtype)
    given = (_empty(_D), wide, _empty(_D), _empty(_B, _D, size), _empty(_B, _L, dtype=torch.uint8))
    rest = given if full else (None,) * 5
    with recording() as launches:
        inputs = scan.Inputs.of(wide, wide, _empty(_D, size), narrow, narrow, *rest, softplus=full)
        y, final, states = scan.scan_forward(inputs)
        scan.scan_backward(inputs, states, y, final if full else None)
    return launches


def conv_launches(taps: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward convolution would launch; ``full`` as for the scan."""
    x = _empty(_B, _L, _D, dtype=dtype)
    given = (_empty(_D), _empty(_B, taps - 1, _D, dtype=dtype), _empty(_B, _L, dtype=torch.int32))
    tensors = (x, _empty(_D, taps), *(given if full else (None,) * 3))
    with recording() as launches:
        conv.conv_forward(*tensors, silu=full)
        conv.conv_backward(*tensors, dy=x, silu=full)
    return launches


def compilations(whole: bool) -> list[Compilation]:
    """Return what is compiled: representative launches with their first tile, or everything."""
    found: list[Compilation] = []

    def add(label: str, make: Callable[..., list[Launch]], number: int, dtype: torch.dtype, full: bool) -> None:
        kind = str(dtype).removeprefix("torch.")
        for launch in make(number, dtype, full):
            tiles = launch.tiles if whole else launch.tiles[:1]
            found.extend(Compilation(f"{label}={number} {kind}{'' if full else ' bare'}", launch, t) for t in tiles)

    for size in _SIZES if whole else [16]:
        add("N", scan_launches, size, torch.float32, True)
    for taps in range(1, MAX_TAPS + 1) if whole else [4]:
        add("K", conv_launches, taps, torch.float32, True)
    for dtype, full in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)) if whole else ():
        add("N", scan_launches, 16, dtype, full)
        add("K", conv_launches, 4, dtype, full)
    return found


def report(whole: bool, targets: list[str], kernel: str = "", jobs: int = 2, timeout: float = 120.0) -> Iterator[Usage]:
    """Yield what every kernel whose name contains ``kernel`` uses; each is compiled in a process of its own."""
    found = [c for c in compilations(whole) if kernel in c.launch.kernel.__name__]
    pairs = [(c, TARGETS[name]) for c in found for name in targets]
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda pair: usage(pair[0], pair[1], timeout), pairs)


def _options(arguments: list[str]) -> dict[str, str]:
    options = dict(_DEFAULTS)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name not in options or not sign:
            raise ConfigError(f"option {argument!r} is not name=value of a known one{suggest(name, options)}")
        options[name] = value
    for name in options["targets"].split(","):
        if name not in TARGETS:
            raise ConfigError(f"targets={name!r} is not known{suggest(name, TARGETS)}")
    return options


_COLUMNS = ("kernel", "label", "tile", "target", "registers", "stack", "spills", "shared", "seconds")


def main(arguments: list[str]) -> int:
    """Print the table and return the exit code."""
    options = _options(arguments)
    print("\t".join((*_COLUMNS, "problem")))
    rows: list[dict[str, Any]] = []
    used_by_all = report(
        options["whole"] == "true", options["targets"].split(","), options["kernel"], int(options["jobs"]),
        float(options["timeout"]),
    )  # fmt: skip
    for used in used_by_all:
        row = used._asdict() | {"seconds": round(used.seconds, 1), "problem": used.problem}
        rows.append(row)
        print("\t".join(str(row[c]) for c in (*_COLUMNS, "problem")), flush=True)
    if options["out"]:
        write_json(Path(options["out"]), rows)
    bad = sum(bool(row["problem"]) for row in rows)
    print(f"{len(rows)} compilations, {bad} with a problem", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
