"""What the package does to the process that it runs in: short waits of OpenMP's threads, and memory that stays."""

import os
import platform
import subprocess
import sys

import pytest

glibc_alone = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
linux_alone = pytest.mark.skipif(sys.platform != "linux", reason="libgomp and /proc")

TEAM = """
import threading
model = hybridnas.build("M", d_model=8, vocab_size=16)
threads = [thread.name for thread in threading.enumerate() if thread.name == "hybridnas: short waits"]
model = hybridnas.build("M", d_model=8, vocab_size=16)
print(len(threads), threading.active_count())
"""
PAGES = """
import resource
from torch import empty
from hybridnas.hardware import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [empty(1 << 21).fill_(1.0) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


def printed(code, **variables):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **variables})
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@linux_alone
@pytest.mark.parametrize(
    ("imports", "variables", "teams"),
    [
        ("import torch, hybridnas", {"OMP_NUM_THREADS": "2"}, 1),
        ("import hybridnas, torch", {"OMP_NUM_THREADS": "2"}, 0),
        ("import torch, hybridnas", {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "9"}, 0),
        ("import torch, hybridnas", {"OMP_NUM_THREADS": "1"}, 0),
    ],
)
def test_waits_are_shortened_by_one_second_team_where_torch_was_imported_first(imports, variables, teams):
    assert printed(imports + TEAM, **variables) == [teams, 1 + teams]


@glibc_alone
def test_memory_that_a_step_frees_is_taken_by_the_next_without_new_pages():
    before, after = printed(PAGES)
    assert before > 4096  # 640 MiB in pages of 4 KiB are 163,840
    assert after < before / 100


@glibc_alone
def test_a_malloc_that_the_environment_tunes_is_left_alone():
    before, after = printed(PAGES, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert after > before / 2
