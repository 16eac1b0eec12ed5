"""What every test stands on: one thread, so that a busy machine is not spent on waiting, and no trace in the home."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported: short waits between OpenMP threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hybridnas", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("hybridnas")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Shards, tokenizers and compiled kernels of the tests lie in a folder of their own."""
    os.environ["HYBRIDNAS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
