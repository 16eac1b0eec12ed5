"""What Triton makes of the kernels, read without a GPU: 64-bit offsets in its code, and the tuner's choice on disk."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed here (it has no wheel for this system)")
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


def test_every_tensor_that_grows_with_batch_or_length_is_addressed_with_64_bits():
    from hybridnas.kernels._triton.cases import compilations
    from hybridnas.kernels._triton.compiled import TARGETS, intermediate

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


# Triton's tuner itself, with a clock that says which tile was fastest and a GPU that takes every launch
_TUNED = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, autotuner, driver

from hybridnas.kernels._triton.cases import compilations
from hybridnas.kernels._triton.launch import launch

class Gpu:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Gpu())
timed, chosen = [], {}

def clock(self, *args, config, **meta):
    timed.append(self.fn.__name__)
    return [float(-len(timed))] * 3  # each is faster than those before

def take(self, *args, grid=None, warmup=None, **meta):
    chosen[self.__name__] = {k: v for k, v in meta.items() if isinstance(v, int)}

autotuner.Autotuner._bench = clock
JITFunction.run = take
asked = {}
for one in compilations(False):
    if len(one.launch.tiles) > 1:
        asked[one.launch.kernel.__name__] = one.launch
for one in asked.values():
    for _ in range(2):
        launch(one.kernel, lambda tile: 1, one.tiles, one.key, torch.device("cuda"), **one.arguments)
last = {name: dict(one.tiles[-1].constants) | {"num_warps": one.tiles[-1].warps} for name, one in asked.items()}
for name, tile in chosen.items():
    assert last[name].items() <= tile.items(), (name, tile, last[name])
print(json.dumps({"timed": len(timed), "tiles": sum(len(one.tiles) for one in asked.values()), "kernels": len(asked)}))
"""


def test_the_tuner_times_each_tile_once_and_finds_its_choice_on_disk(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):  # two processes
        done = subprocess.run(
            [sys.executable, "-c", _TUNED], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
    first, second = found
    assert first["kernels"] >= 12 and first["timed"] == first["tiles"]
    assert second["timed"] == 0
    files = list(tmp_path.rglob("*.autotune.json"))
    assert len(files) == first["kernels"]
    kept = json.loads(next(f for f in files if f.name == "ssd_outputs.autotune.json").read_text())
    sizes_and_dtypes = [64, 64, 4]  # P, N and heads of a group, then the dtypes of all tensors
    assert kept["key"][:3] == sizes_and_dtypes and "torch.bfloat16" in kept["key"]
