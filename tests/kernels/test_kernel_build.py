"""Compiling at first use: the cache, several processes at once, and every way in which it can fail."""

import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hybridnas.kernels import _build
from hybridnas.kernels._build import build
from hybridnas.kernels.causal_conv1d.native import SOURCE

compiler = shutil.which(os.environ.get("CC", "cc"))
needs_compiler = pytest.mark.skipif(compiler is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    """A source of one line: a kernel of ours takes seconds to compile, and every other test file compiles them."""
    path = tmp_path / "seven.c"
    path.write_text("int seven(void) { return 7; }\n")
    return path


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_the_second_time_is_cached(cache, source):
    first = build(source)
    assert first.handle.seven() == 7
    assert first.description.startswith("C, compiled by")
    assert "cached" not in first.description
    files = [p.name for p in cache.iterdir()]
    assert len(files) == 1
    assert files[0].startswith("seven-")
    assert build(source).description.endswith("(cached)")


@needs_compiler
def test_a_changed_header_beside_the_source_is_compiled_again(cache, source):
    header = source.with_name("seven.h")
    source.write_text('#include "seven.h"\nint seven(void) { return SEVEN; }\n')
    header.write_text("#define SEVEN 7\n")
    assert build(source).handle.seven() == 7
    header.write_text("#define SEVEN 8\n")
    assert build(source).handle.seven() == 8
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_a_damaged_cached_file_is_compiled_again(cache, source, monkeypatch, tmp_path):
    build(source)
    (file,) = cache.iterdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / file.name).write_bytes(b"not a library")
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "damaged"))
    again = build(source)
    assert again.handle.seven() == 7
    assert "cached" not in again.description


def test_no_compiler_is_said_with_what_to_install(cache, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with caplog.at_level(logging.WARNING, "hybridnas"):
        none = build(SOURCE)
    assert none.handle is None
    assert none.description == "no C compiler found (tried cc, gcc, clang); install gcc or clang to run faster"
    assert [r.message for r in caplog.records] == [f"causal_conv1d runs in plain torch, slower: {none.description}"]


def test_a_failing_compiler_is_said_with_its_last_words(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", script(tmp_path / "badcc", 'echo "internal compiler error: sulking" >&2; exit 4'))
    none = build(SOURCE)
    assert none.handle is None
    assert "failed with exit code 4 (internal compiler error: sulking)" in none.description
    assert not list(cache.iterdir())


def test_a_compiler_that_writes_nonsense_is_said(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", script(tmp_path / "liar", "exit 0"))
    assert "could not be loaded" in build(SOURCE).description


@needs_compiler
def test_a_cache_that_cannot_be_written_still_runs_in_c(source, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "file" / "cache"))  # root writes anywhere but into a file
    built = build(source)
    assert built.handle.seven() == 7
    assert built.description.endswith("(not cached: no cache folder can be written)")


@needs_compiler
def test_a_cache_that_can_only_be_read_is_read(cache, source, monkeypatch):
    build(source)
    monkeypatch.setattr(_build, "_writable", lambda folder: False)  # root can write into any folder
    assert build(source).description.endswith("(cached)")
    for file in cache.iterdir():
        file.unlink()
    built = build(source)
    assert built.handle.seven() == 7
    assert built.description.endswith("(not cached: no cache folder can be written)")
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@needs_compiler
def test_several_processes_may_compile_at_once(cache, source):
    code = (
        "import sys; from pathlib import Path; from hybridnas.kernels._build import build; "
        "sys.exit(build(Path(sys.argv[1])).handle.seven() != 7)"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(2)]
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_without_a_compiler_the_operations_run_in_torch_and_say_so(tmp_path):
    code = (
        "import torch\n"
        "from hybridnas.kernels import selective_scan, causal_conv1d\n"
        "from hybridnas.kernels.selective_scan import selective_scan as scan, describe\n"
        "from hybridnas.kernels.causal_conv1d import causal_conv1d as conv, describe as describe_conv\n"
        "x = torch.randn(1, 5, 3, requires_grad=True)\n"
        "y = scan(conv(x, torch.randn(3, 4), activation='silu'), x.abs(), -torch.ones(3, 2), x[..., :2], x[..., 1:])\n"
        "y.sum().backward(); assert x.grad.isfinite().all()\n"
        "print(describe('cpu')); print(describe_conv('cpu'))\n"
    )
    environment = dict(os.environ, CC=str(tmp_path / "nothing"), HYBRIDNAS_CACHE=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    reason = f"no C compiler found (tried {tmp_path / 'nothing'}); install gcc or clang to run faster"
    assert done.stdout.splitlines() == [
        f"torch: chunk by chunk (native is not compiled: {reason})",
        f"torch: F.conv1d (native is not compiled: {reason})",
    ], done.stderr
    assert done.stderr.count("runs in plain torch, slower") == 2


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc here")
def test_the_library_is_loaded_once_and_shares_the_openmp_of_torch():
    code = (  # in a process of its own: other libraries of this one, as scikit-learn, bring pools of theirs
        "from pathlib import Path\n"
        "from hybridnas.kernels import _build\n"
        f"source = Path({str(SOURCE)!r})\n"
        "assert _build.library(source) is _build.library(source)\n"
        "assert _build.threads() >= 1\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) <= 1
