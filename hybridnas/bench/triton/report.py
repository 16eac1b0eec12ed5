"""Compile every Triton kernel for GPUs that need not be here, and print what each uses.

``python -m hybridnas.bench.triton.report [whole=true] [targets=sm_80,sm_90,gfx942] [kernel=NAME,NAME] [jobs=N]
[timeout=SECONDS] [out=FILE]`` compiles every tile of every kernel, the first ones at common sizes and dtypes and the
others where they are first used, or with ``whole`` every tile at every size class and dtype; ``kernel`` keeps those
whose name contains one of these. The exit code is 1 where a kernel does not compile in time, spills registers or needs
more than the target has. Nothing here runs a kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hybridnas.bench.triton.cases import compilations
from hybridnas.bench.triton.compiled import TARGETS, Compilation, Target, Usage, identity, usage
from hybridnas.errors import ConfigError, suggest
from hybridnas.files import write_json

_DEFAULTS = {"whole": "false", "targets": ",".join(TARGETS), "kernel": "", "jobs": "2", "timeout": "120", "out": ""}


def report(whole: bool, targets: list[str], kernel: str = "", jobs: int = 2, timeout: float = 120.0) -> Iterator[Usage]:
    """Yield what every kernel whose name contains ``kernel`` uses; each is compiled in a process of its own.

    Launches that are one kernel are compiled once, under the first one's label.
    """
    found = [c for c in compilations(whole) if any(name in c.launch.kernel.__name__ for name in kernel.split(","))]
    different: dict[str, tuple[Compilation, Target]] = {}
    for compilation in found:
        for target in (TARGETS[name] for name in targets):
            different.setdefault(identity(compilation, target), (compilation, target))
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda pair: usage(pair[0], pair[1], timeout), different.values())


def _options(arguments: list[str]) -> dict[str, str]:
    options = dict(_DEFAULTS)
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if name not in options or not sign:
            message = f"option {argument!r} is not name=value of a known one{suggest(name, options)}"
            raise ConfigError(message, field=name, got=argument, allowed=list(options))
        options[name] = value
    for name in options["targets"].split(","):
        if name not in TARGETS:
            message = f"targets={name!r} is not known{suggest(name, TARGETS)}"
            raise ConfigError(message, field="targets", got=name, allowed=list(TARGETS))
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
