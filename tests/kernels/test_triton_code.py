"""What Triton makes of the kernels, read without a GPU: 64-bit offsets in its code, and the tuner's choice on disk."""

import json
import os
import re
import threading

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, autotuner, driver

from hybridnas.bench.triton.cases import compilations
from hybridnas.bench.triton.compiled import TARGETS, intermediate
from hybridnas.kernels._triton import launch as launcher

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="reads compiled code")

# addressed with 32 bits: one number a channel, head, expert, tap or row, never a tensor of rows by channels
SMALL = {"A", "bias", "skip", "ends", "source", "choice"}
SMALL_WEIGHTS = {"conv_forward", "conv_backward", "norm_forward", "norm_backward"}


def narrow_pointers(code):
    """Return the arguments that some load or store reaches without any 64-bit offset, and those reached at all."""
    pointers = {}  # name of a value -> the argument it points into, whether a 64-bit offset was added
    header = re.search(r"tt\.func public @\w+\((.*?)\) attributes", code, re.S).group(1)
    for name in re.findall(r"%(\w+): !tt\.ptr", header):
        pointers[name] = (name, False)
    narrow, reached = set(), set()
    for line in code.splitlines():
        made = re.match(r"\s*%(\w+) = tt\.(addptr|splat|broadcast|expand_dims) %(\w+)", line)
        if made and made.group(3) in pointers:
            argument, is_wide = pointers[made.group(3)]
            offset = line.split(" loc(")[0].rsplit(",", 1)[1] if made.group(2) == "addptr" else ""
            pointers[made.group(1)] = (argument, is_wide or "i64" in offset)
        used = re.search(r"tt\.(?:load|store) %(\w+)", line)
        if used and used.group(1) in pointers:
            argument, is_wide = pointers[used.group(1)]
            reached.add(argument)
            if not is_wide:
                narrow.add(argument)
    return narrow, reached


@pytest.mark.slow
def test_every_tensor_that_grows_with_batch_or_length_is_addressed_with_64_bits():
    seen, narrow, reached = set(), set(), set()
    for one in compilations(False):
        name = one.launch.kernel.__name__
        if name in seen:
            continue
        seen.add(name)
        found, all_ = narrow_pointers(intermediate(one, TARGETS["sm_90"]))
        narrow |= {(name, argument) for argument in found}
        reached |= {(name, argument) for argument in all_}
    assert len(reached) > 120
    large = {pair for pair in narrow if pair[1] not in SMALL}
    assert large == {(kernel, "weight") for kernel in SMALL_WEIGHTS}


class Gpu:
    """A driver whose GPU is never asked to run anything."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def tuned(monkeypatch):
    """Launch every kernel with several tiles twice; return how many tiles were timed, and those of the kernels.

    Triton's own tuner, on a clock by which each measurement is faster than those before, and without a GPU.
    """
    timed, chosen = [], {}

    def clock(self, *args, config, **meta):
        timed.append(self.fn.__name__)
        return [float(-len(timed))] * 3

    def take(self, *args, grid=None, warmup=None, **meta):
        chosen[self.__name__] = {k: v for k, v in meta.items() if isinstance(v, int)}

    launcher._tuner.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", Gpu())
        patch.setattr(autotuner.Autotuner, "_bench", clock)
        patch.setattr(JITFunction, "run", take)
        several = [one.launch for one in compilations(False) if len(one.launch.tiles) > 1]
        launches = {one.kernel.__name__: one for one in several}
        for one in launches.values():
            for _ in range(2):
                launcher.launch(one.kernel, lambda tile: 1, one.tiles, one.key, torch.device("cuda"), **one.arguments)
    launcher._tuner.cache_clear()
    for name, tile in chosen.items():
        last = launches[name].tiles[-1]
        assert (dict(last.constants) | {"num_warps": last.warps}).items() <= tile.items()
    return len(timed), launches


def test_the_tuner_times_each_tile_once_and_finds_its_choice_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    timed, launches = tuned(monkeypatch)
    assert len(launches) >= 12 and timed == sum(len(one.tiles) for one in launches.values())
    timed, _ = tuned(monkeypatch)  # tuners that know nothing but the disk
    assert timed == 0
    files = list(tmp_path.rglob("*.autotune.json"))
    assert len(files) == len(launches)
    kept = json.loads(next(f for f in files if f.name == "ssd_outputs.autotune.json").read_text())
    sizes_and_dtypes = [64, 64, 4]  # P, N and heads of a group, then the dtypes of all tensors
    assert kept["key"][:3] == sizes_and_dtypes and "torch.bfloat16" in kept["key"]


def test_launches_of_another_thread_are_not_recorded():
    kernel, done = compilations(False)[0].launch.kernel, []

    def record():
        with launcher.recording() as launches:
            started.set()
            assert finished.wait(10)
        done.extend(launches)

    started, finished = threading.Event(), threading.Event()
    thread = threading.Thread(target=record)
    thread.start()
    assert started.wait(10)
    with launcher.recording() as here:
        launcher.launch(kernel, lambda tile: 1, [launcher.Tile.of(1)], (), torch.device("meta"))
    finished.set()
    thread.join()
    assert done == [] and [one.kernel for one in here] == [kernel]
