"""The Triton kernels compile for GPUs that are not here, spill nothing and fit; and what they are counted to move.

Every tile of every kernel: ``python -m hybridnas.bench.triton.report``, as .ci/run does; every tile at every size
and dtype: the same with ``whole=true`` (long).
"""

import itertools
import json
import os
import subprocess
import sys

import pytest

from hybridnas.bench.triton.cases import compilations
from hybridnas.bench.triton.compiled import TARGETS, Usage, identity, intermediate
from hybridnas.bench.triton.report import main
from hybridnas.bench.triton.traffic import (
    Traffic,
    conv_traffic,
    loss_traffic,
    moe_traffic,
    norm_traffic,
    scan_traffic,
    ssd_traffic,
)
from hybridnas.errors import ConfigError
from hybridnas.kernels._triton.shapes import MAX_STATE, power_of_two, scan_parts
from hybridnas.kernels.selective_scan.triton import tiles

KERNELS = {
    "chunk_states", "pass_states", "chunk_outputs", "chunk_gradients", "pass_gradients", "chunk_inputs_gradients",
    "conv_forward", "conv_backward", "norm_forward", "norm_backward", "cross_entropy_rows", "ssd_steps", "ssd_scores",
    "ssd_states", "ssd_pass_states", "ssd_outputs", "ssd_gate_gradients", "ssd_pass_gradients",
    "ssd_inputs_gradients", "ssd_scores_gradients", "ssd_maps_gradients", "ssd_steps_gradients", "count_choices",
    "place_choices", "grouped_rows", "grouped_weights", "combine", "spread", "gd_sums", "gd_operands",
    "gd_head_pairs", "gd_channel_pairs", "gd_inverse", "gd_mix", "gd_pass_states", "gd_outputs", "gd_pass_gradients",
    "gd_pairs_gradients", "gd_states_gradients", "gd_head_gradients", "gd_channel_gradients", "gd_head_decays",
    "gd_channel_decays", "diagonal_forward", "diagonal_backward",
}  # fmt: skip
FEW = {"combine", "spread"}  # those that compile fastest; all of them: the report, which .ci/run calls


def run_report(folder, *options):
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error::UserWarning", "-m", "hybridnas.bench.triton.report", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_kernels_compile_without_spills_and_fit_on_every_target(tmp_path):
    out = tmp_path / "report.json"
    done = run_report(tmp_path, f"kernel={','.join(sorted(FEW))}", f"out={out}", "timeout=300")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads(out.read_text())
    assert {(row["kernel"], row["target"]) for row in rows} == set(itertools.product(FEW, TARGETS))
    for row in rows:
        most_registers = {"gfx942": 512}.get(row["target"], 255)
        most_shared = {"sm_80": 163, "sm_90": 227, "gfx942": 64}[row["target"]] * 1024
        assert (row["problem"], row["stack"], row["spills"]) == ("", 0, 0), row
        assert 0 < row["registers"] <= most_registers, row
        assert 0 <= row["shared"] <= most_shared, row


@pytest.mark.parametrize(("option", "field"), [("target=sm_80", "target"), ("targets=sm_81", "targets")])
def test_a_wrong_option_of_the_report_is_named(option, field):
    with pytest.raises(ConfigError) as refused:
        main([option])
    assert refused.value.field == field


def test_the_report_has_every_kernel_and_every_configuration():
    few, every = compilations(False), compilations(True)
    assert {c.launch.kernel.__name__ for c in few} == {c.launch.kernel.__name__ for c in every} == KERNELS
    tiles = {(c.launch.kernel.__name__, tile) for c in every for tile in c.launch.tiles}
    for compiled in few, every:
        assert tiles == {(c.launch.kernel.__name__, c.tile) for c in compiled}


def test_launches_of_one_identity_are_one_kernel():
    found = {}
    for compilation in compilations(False):
        if compilation.launch.kernel.__name__ in ("count_choices", "ssd_pass_states"):
            found.setdefault(identity(compilation, TARGETS["sm_80"]), []).append(compilation)
    texts = [{intermediate(compilation, TARGETS["sm_80"]) for compilation in same} for same in found.values()]
    assert all(len(text) == 1 for text in texts)
    assert len(set().union(*texts)) == len(found) < sum(map(len, found.values()))


def test_a_limit_that_is_passed_is_named():
    fine = Usage("k", "N=16", "", "sm_80", registers=255, shared=163 * 1024)
    assert fine.problem == ""
    assert fine._replace(stack=8).problem == "spills registers: 0 spilled, 8 bytes of stack"
    assert fine._replace(spills=4).problem == "spills registers: 4 spilled, 0 bytes of stack"
    assert fine._replace(shared=163 * 1024 + 1).problem == "166913 bytes shared, 166912 are allowed"
    assert fine._replace(failed="did not compile in 1 s").problem == "did not compile in 1 s"


@pytest.mark.parametrize("backward", [False, True])
def test_every_state_size_of_the_scan_has_a_tile(backward):
    assert all(tiles(size, backward=backward) for size in range(1, MAX_STATE + 1))


def test_triton_modules_are_not_imported_before_they_are_needed():
    names = "hybridnas.kernels.selective_scan, hybridnas.kernels.causal_conv1d, hybridnas.bench.triton.traffic"
    command = [sys.executable, "-X", "importtime", "-c", f"import {names}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    early = {name for name in imported if name.startswith("hybridnas") and "triton" in name.rsplit(".", 1)[-1]}
    assert early == {"hybridnas.kernels._triton", "hybridnas.bench.triton"}  # torch itself may import triton


def test_traffic_of_the_scan_is_what_its_tensors_weigh():
    counted = scan_traffic(batch=2, length=128, channels=64, size=16, dtype_bytes=4)
    wide, narrow, states = 2 * 128 * 64 * 4, 2 * 128 * 16 * 4, 2 * 2 * 64 * 16 * 4
    # reads u, delta, z, writes y; B, C; the start states; A and the final state's like
    assert counted["chunk_outputs"].bytes == 4 * wide + 2 * narrow + states + 2 * 64 * 16 * 4
    assert counted["chunk_outputs"].flops > 8 * 2 * 128 * 64 * 16
    halved = scan_traffic(batch=2, length=128, channels=64, size=16, dtype_bytes=2)
    assert halved["chunk_outputs"].bytes < counted["chunk_outputs"].bytes
    assert halved["chunk_outputs"].flops == counted["chunk_outputs"].flops
    longer = scan_traffic(batch=2, length=256, channels=64, size=16)["chunk_inputs_gradients"].bytes
    assert 1.9 < longer / counted["chunk_inputs_gradients"].bytes <= 2
    assert scan_traffic(2, 64, 64, 16)["chunk_states"].flops == 0  # one chunk starts from the given state


def test_traffic_of_the_convolution_is_what_its_tensors_weigh():
    counted = conv_traffic(batch=2, length=100, channels=64, taps=4)
    assert counted["conv_forward"] == Traffic(2 * 2 * 100 * 64 * 4 + 64 * 5 * 4, 13 * 2 * 100 * 64)
    assert set(counted) == {"conv_forward", "conv_backward", "sums"}


def test_traffic_of_state_space_duality_is_what_its_tensors_weigh():
    counted = ssd_traffic(batch=2, length=256, heads=4, width=8, groups=1, size=16, dtype_bytes=2)
    wide, narrow, lines, states = 2 * 256 * 4 * 8 * 2, 2 * 256 * 16 * 2, 2 * 256 * 4 * 4, 2 * 2 * 4 * 8 * 16 * 4
    assert counted["ssd_states"].bytes == wide + narrow + 3 * lines + states
    scores = 2 * 2 * 128 * 128 * 4  # of which 3 of 4 tiles of 64 x 64 are not above the diagonal
    assert counted["ssd_outputs"].bytes == 4 * wide + narrow + 3 * lines + 3 * scores // 4 + states
    assert counted["ssd_states"].flops > 2 * 2 * 256 * 4 * 8 * 16
    assert ssd_traffic(2, 256, 4, 8, 1, 16, gated=False)["ssd_gate_gradients"] == Traffic(0, 0)


def test_traffic_of_experts_norms_and_losses_is_what_their_tensors_weigh():
    counted = moe_traffic(tokens=100, choices=2, n_experts=4, width=8, hidden=16)
    assert counted["grouped_rows, up"] == Traffic(4 * (100 * 8 + 200 + 4 * 8 * 16 + 200 * 16), 2 * 200 * 8 * 16)
    assert counted["combine"].bytes == 4 * (200 * 8 + 2 * 200 + 100 * 8)
    norm = norm_traffic(rows=32, features=64, centered=True, fused=True)
    assert norm["norm_forward"].bytes == 4 * (4 * 32 * 64 + 2 * 64 + 2 * 32)
    assert norm_traffic(rows=32, features=64)["norm_backward"].bytes == 4 * (3 * 32 * 64 + 64 + 32 + 2 * 64)
    assert loss_traffic(rows=3, vocabulary=7)["cross_entropy_rows"].bytes == 4 * 3 * 3 * 7 + 16 * 3


def test_time_is_that_of_the_slower_of_memory_and_arithmetic():
    assert Traffic(bytes=300, flops=10).seconds(bytes_per_second=100, flops_per_second=100) == 3.0
    assert Traffic(bytes=300, flops=1000).seconds(bytes_per_second=100, flops_per_second=100) == 10.0


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 512, 1000, 1024, 1100, 5120])
def test_parts_cover_all_channels_once(channels):
    parts, width = scan_parts(channels)
    assert width % 64 == 0 and 1 <= parts <= 16
    assert (parts - 1) * width < channels <= parts * width


def test_powers_of_two_hold_their_number():
    assert [power_of_two(n) for n in (1, 2, 3, 5, 16, 17)] == [1, 2, 4, 8, 16, 32]
