"""The gate of a GPU: where it runs. ``HYBRIDNAS_REHEARSE=1`` runs it on a processor, to find what is missing early."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def impl(device: torch.device) -> str:
    """The implementation to be judged: Triton on a GPU and in its interpreter."""
    return "triton" if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else "auto"


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    """Let torch fill new memory with NaN, so that an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # some operations have no such form on a GPU
    yield
    torch.use_deterministic_algorithms(False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append each test's end to the file that ``HYBRIDNAS_GATE_LOG`` names: a run cut short still tells."""
    path = os.environ.get("HYBRIDNAS_GATE_LOG")
    if path and (report.when == "call" or report.outcome != "passed"):
        line = {"test": report.nodeid, "when": report.when, "outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            line["why"] = str(report.longrepr)[-2000:]
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
