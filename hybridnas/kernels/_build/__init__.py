"""Compile the package's C files with the machine's own compiler at first use, and cache the result.

A library is cached per user under a hash of everything that decides its code: source, the headers beside it and here,
flags, compiler, processor. It is written to a temporary name and renamed, so that any number of processes may compile
at once; a cache that cannot be written is still read. Where nothing can be compiled the reason is logged once and
printed by ``describe``; a missing compiler is no error.

Environment: CC names the compiler, HYBRIDNAS_CACHE the cache folder (default: XDG_CACHE_HOME or ~/.cache, /hybridnas).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from hybridnas.files import cache_home

_LOG = logging.getLogger("hybridnas")
_HERE = Path(__file__).resolve().parent
_COMMON = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast")
_SHARED = ("-shared", "-fPIC")
# best first: some compilers know no -march=native, Apple's brings no OpenMP
_VARIANTS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
_TIMEOUT = 120  # seconds for one run of the compiler; it takes about two

# State of the process: a library is loaded once and never unloaded, and a forked child must know that it is one.
_lock = threading.Lock()  # one thread compiles, the others wait
_loaded: dict[Path, Library] = {}
_after_fork = False


class Library(NamedTuple):
    """A loaded library, or None where there is none."""

    handle: ctypes.CDLL | None
    description: str  # how it was compiled, or why it could not be


def library(source: Path, lost: str = "") -> Library:
    """Return the compiled ``source``, compiling it the first time; never raises, the reason is in ``description``.

    ``lost``: what a warning says where it cannot be compiled, if not that the operation runs in plain torch.
    """
    found = _loaded.get(source)
    if found is None:
        with _lock:
            found = _loaded.get(source)
            if found is None:
                found = _loaded[source] = build(source, lost)
    return found


def build(source: Path, lost: str = "") -> Library:
    """Compile and load ``source`` without remembering it, or log and return why that failed."""
    try:
        return _build(source)
    except _BuildError as error:
        _LOG.warning("%s: %s", lost or f"{source.parent.name} runs in plain torch, slower", error)
        return Library(None, str(error))


def threads() -> int:
    """Return how many threads a kernel may use: torch's number, one in a forked child, whose OpenMP pool is gone."""
    return 1 if _after_fork else torch.get_num_threads()


class _BuildError(Exception):
    """Why there is no library."""


def _build(source: Path) -> Library:
    compiler, version = _compiler()
    headers = [header for folder in (source.parent, _HERE) for header in sorted(folder.glob("*.h"))]
    key = hashlib.sha256()
    for part in (
        *(file.read_bytes() for file in (source, *headers)),
        *(text.encode() for text in (version, _processor(), repr(_VARIANTS), repr(_COMMON))),
    ):
        key.update(part)
        key.update(b"\0")
    name = f"{source.stem}-{key.hexdigest()[:24]}.so"
    how = f"C, compiled by {compiler[0]}"
    folder = _cache_folder()
    target = None if folder is None else folder / name
    if target is not None and target.exists():  # also in a cache that only others may write
        with contextlib.suppress(_BuildError):  # a damaged file is compiled again
            return Library(_load(target), f"{how} (cached)")
    if target is None or not _writable(target.parent):
        with tempfile.TemporaryDirectory(prefix="hybridnas-") as temporary:  # a loaded file may be deleted at once
            target = Path(temporary) / name
            _compile(compiler, source, target)
            return Library(_load(target), f"{how} (not cached: no cache folder can be written)")
    _compile(compiler, source, target)
    return Library(_load(target), how)


def _compiler() -> tuple[list[str], str]:
    """Return the compiler's command and its version text."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    for command in candidates:
        if shutil.which(command[0]):
            done = _run([*command, "--version"])
            return command, " ".join(command) + done.stdout
    tried = ", ".join(c[0] for c in candidates)
    raise _BuildError(f"no C compiler found (tried {tried}); install gcc or clang to run faster")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _BuildError(f"the C compiler {command[0]!r} could not be run ({error})") from None


def _processor() -> str:
    """Return what -march=native depends on: the processor's model and abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path | None:
    """Return the cache folder, which may be read-only, or None where there is none and none can be made."""
    try:
        folder = cache_home()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return folder


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _compile(compiler: list[str], source: Path, target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", prefix=target.stem, dir=target.parent)
    os.close(handle)
    try:
        for variant in _VARIANTS:
            done = _run([*compiler, *_COMMON, *_SHARED, *variant, f"-I{_HERE}", str(source), "-o", name, "-lm"])
            if done.returncode == 0:
                Path(name).replace(target)
                return
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise _BuildError(
            f"the C compiler {compiler[0]!r} failed with exit code {done.returncode} ({last}); "
            "install a working gcc or clang, or name one in CC, to run faster"
        )
    finally:
        Path(name).unlink(missing_ok=True)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))  # finds the OpenMP that torch has loaded: one pool of threads for both
    except OSError as error:
        raise _BuildError(f"the compiled library could not be loaded ({error}); install gcc or clang") from None


def _forked() -> None:
    global _after_fork, _lock
    _after_fork = True
    _lock = threading.Lock()  # another thread may have held it when the process split


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
