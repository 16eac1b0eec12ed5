"""Other packages that the benchmarks compare with: optional, imported by name."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

# import name -> name to install by, and how; those of the [bench] extra run on any machine, the others need CUDA
_INSTALL = {
    "mambapy": ("mambapy", "hybridnas[bench]"),
    "transformers": ("transformers", "hybridnas[bench]"),
    "mamba_ssm": ("mamba-ssm", "mamba-ssm"),
    "fla": ("flash-linear-attention", "flash-linear-attention"),
    "causal_conv1d": ("causal-conv1d", "causal-conv1d"),
}


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return find_spec(name) is not None


def absent(*names: str) -> str:
    """Return what is missing and how to install it, or '' when every peer is there."""
    for name in names:
        if not installed(name):
            package, how = _INSTALL[name]
            return f"{package} is not installed: pip install {how}"
    return ""


def load(module: str) -> Any:
    """Return a peer's module; untyped, as peers are."""
    return importlib.import_module(module)


def load_quietly(module: str) -> Any:
    """Return a module of transformers, without its advice to install CUDA packages."""
    load("transformers.utils.logging").set_verbosity_error()
    return load(module)


def versions() -> dict[str, str]:
    """Return package -> version of every peer that is installed."""
    found = {}
    for name, (package, _) in _INSTALL.items():
        if installed(name):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "unknown"
    return found
