"""What every test stands on: one thread, so that a busy machine is not spent on waiting, and no trace in the home."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported: short waits between OpenMP threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "hybridnas", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.register_profile("ci", settings.get_profile("hybridnas"), derandomize=True)  # the same examples every time
settings.load_profile("ci" if os.environ.get("CI") else "hybridnas")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores Ctrl-C; the tests send it

# Triton has no wheel for macOS and Windows; these files import it
collect_ignore_glob = [] if find_spec("triton") else ["kernels/test_triton_*.py"]

NO_GPU = pytest.StashKey[int]()  # tests that a session leaves out for want of a GPU
KEPT_SECONDS = 14 * 24 * 3600  # how long a compiled kernel is kept for later runs

# Files whose tests search, start processes, export or simulate studies, seconds to minutes each: marked slow, and
# handed out first, so that no process is left alone with one of them at the end. The fast loop does not import them.
SLOW_FILES = (
    "test_examples.py",
    "test_search.py",
    "test_studies.py",
    "test_tracking.py",
    "test_search_slurm.py",
    "test_search_workers.py",
    "test_search_postgres.py",
    "test_search_chaos.py",
    "test_search_resume.py",
    "test_search_objectives.py",
    "test_search_confirm.py",
    "test_search_promotion.py",
    "test_train_distributed.py",
    "test_train_cli.py",
    "test_suites_command.py",
    "test_kernel_build.py",
    "test_process.py",
    "test_triton_compile.py",
    "test_bench_samplers.py",
    "test_plugins.py",
    "test_samplers.py",
    "test_json.py",
    "test_ladder.py",
    "test_ladder_postgres.py",
    "test_hf_writing.py",
    "test_hf_auto.py",
    "test_hf_peft.py",
    "test_hf_scored.py",
    "test_hf_released.py",
    "test_coverage.py",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave slow files alone where their tests would all be deselected: importing them takes seconds."""
    return True if config.option.markexpr == "not slow" and collection_path.name in SLOW_FILES else None


@pytest.hookimpl(tryfirst=True)  # before -m "not slow" is applied
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this session cannot run; files that take long come first, the others stay in their order."""
    for item in items:
        if item.path.name in SLOW_FILES:
            item.add_marker("slow")
    absent = set() if os.environ.get("TRITON_INTERPRET") == "1" else {"interpreter"}
    if "long" not in config.option.markexpr and not any(".py" in argument for argument in config.args):
        absent.add("long")  # a session of their own, like those of the interpreter; a file that is named runs whole
    if any("gpu" in item.keywords for item in items):
        import torch

        rehearsed = os.environ.get("HYBRIDNAS_REHEARSE") == "1"  # the gate of a GPU on a processor
        absent |= set() if torch.cuda.is_available() or rehearsed else {"gpu"}
    left_out = [item for item in items if any(name in item.keywords for name in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    config.stash[NO_GPU] = sum("gpu" in item.keywords for item in left_out)
    place = {name: number for number, name in enumerate(SLOW_FILES)}
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: place.get(item.path.name, len(place) + (item.path not in slow)))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Count it as no failure that a machine without a GPU has nothing to run of ``-m gpu``."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.stash.get(NO_GPU, 0):
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and (count := config.stash.get(NO_GPU, 0)):
        terminalreporter.write_line(f"{count} tests skipped: they need a CUDA device, and this machine has none")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process more than processors where slow tests run: they wait for other processes and for deadlines."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None  # pytest-xdist's own choice
    return len(os.sched_getaffinity(0)) + (config.option.markexpr != "not slow")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[None]:
    """Shards, tokenizers and compiled kernels lie in a folder of this run, one for all its processes.

    Compiled kernels are kept in pytest's cache for later runs: their names hold a hash of source, compiler, processor.
    """
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    cache.mkdir(exist_ok=True)
    os.environ["HYBRIDNAS_CACHE"] = str(cache)
    kept = pytestconfig.cache.mkdir("kernels") if hasattr(pytestconfig, "cache") else None
    if kept is None:
        yield
        return
    from hybridnas.files import write_atomic

    for library in kept.glob("*.so"):
        if time.time() - library.stat().st_mtime > KEPT_SECONDS:
            library.unlink(missing_ok=True)
        elif not (cache / library.name).exists():
            write_atomic(cache / library.name, library.read_bytes())
    yield
    for library in cache.glob("*.so"):
        if not (kept / library.name).exists():
            write_atomic(kept / library.name, library.read_bytes())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Bits that are compared come from one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty short texts that a small model can learn something of."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ("state", "space", "expert", "mamba", "token", "router", "layer", "width", "depth", "scan")
    for number in range(40):
        lines = (" ".join(words[(number * i + j * j) % len(words)] for j in range(9)) for i in range(1, 30))
        (folder / f"{number:02}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def tiny(corpus: Path) -> list[str]:
    """Settings of a search whose trials take a tenth of a second each: eight steps of 128 tokens."""
    budget = {
        "d_model": 16,
        "depth": 2,
        "n_experts": 2,
        "multiple": 1,
        "seq_len": 32,
        "batch_size": 4,
        "tokens_per_active_param": 0.2,
        "rungs": 2,
        "reduction": 2,
        "evals": 2,
        "lr": 0.003,
        "valid_tokens": 256,
        "minutes": "null",
    }
    # Hyperband, so that two trials without others to be compared with run to their end; halving has tests of its own.
    own = ["data=text", f"data.path={corpus}", "tracking=off", "pruner=hyperband"]
    return [*own, *(f"budget.{key}={x}" for key, x in budget.items())]
