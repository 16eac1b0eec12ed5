"""Suites: small trainings of many architectures on the same tasks, beside what papers published.

One suite is one file here and one registration: its tasks, how each is trained, the grid of rates, the default
architectures and the published rows. ``run_suite("mqar", model)`` trains a model of your own on one. Importing this
package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridnas.suites.runner import run_suite as run_suite

__all__ = ["run_suite"]


def __getattr__(name: str) -> Any:
    if name != "run_suite":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hybridnas.suites.runner import run_suite

    return run_suite
