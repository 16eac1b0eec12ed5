"""A run that was interrupted or killed goes on, and ends in the same bits."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from counting import STEPS, VOCAB, Counting, CrashError, arch_of, crash_at, ctrl_c_at, run, same_bits, settings
from torch import nn

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import CheckpointError
from hybridnas.layers.block import Aux, Block, BlockConfig, BlockOutput
from hybridnas.registry import BLOCKS, register_block
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, OnEval

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dropping_block():
    """A block with dropout and an auxiliary loss: what it computes depends on the generator's state."""

    @register_block("Q", name="dropping")
    class Dropping(Block):
        @dataclass(frozen=True, kw_only=True)
        class Config(BlockConfig):
            rate: float = option(0.5, "share of channels dropped [0 to 1]")

            def cost(self, seq_len, dtype_bytes=4):
                return Cost(params=self.d_model**2, active_params=self.d_model**2)

        def __init__(self, config, *, impl):
            super().__init__(config, impl=impl)
            self.linear = nn.Linear(config.d_model, config.d_model, bias=False)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x_BLD, state=None):
            if self.training:
                self.calls += 1
            y_BLD = nn.functional.dropout(self.linear(x_BLD), self.config.rate, self.training)
            return BlockOutput(
                y_BLD, state, Aux({"size": 0.01 * y_BLD.square().mean()}, {"mean": y_BLD.detach().mean()})
            )

        def init_state(self, batch_size, *, device, dtype):
            return ()

        def reset_parameters(self, init_scale=0.1):
            nn.init.normal_(self.linear.weight, std=0.1)

    yield
    BLOCKS.remove("Q")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("steps", [(0, 1), (3, 4), (4, 9), (5, 11), (7,)], ids=str)
def test_two_interrupts_cost_no_bit(tmp_path, undisturbed, steps):
    source = Counting(ctrl_c_at(*steps))
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, source=source)
        done = checkpoint.load(tmp_path).header["progress"]["step"]
        assert done == step + 1  # the step was finished and saved
    same_bits(run(tmp_path, source=source), undisturbed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["every-step", "at-measurements"])
@pytest.mark.parametrize("steps", [(1, 6), (3, 10)], ids=str)
def test_two_crashes_cost_no_bit(tmp_path, undisturbed, steps, seconds):
    source = Counting(crash_at(*steps))
    config = settings(checkpoint_seconds=seconds)
    for _ in steps:
        with pytest.raises(CrashError):
            run(tmp_path, config, source=source)
    same_bits(run(tmp_path, config, source=source), undisturbed)


def test_dropout_and_buffers_go_on_as_if_nothing_had_been(tmp_path, dropping_block):
    arch = arch_of("QMQ")
    whole = run(tmp_path / "whole", arch=arch)
    source = Counting(ctrl_c_at(2, 5))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", arch=arch, source=source)
    again = run(tmp_path / "cut", arch=arch, source=source)
    same_bits(again, whole)
    assert [int(b.calls) for b in again.model.blocks() if b.letter == "Q"] == [STEPS, STEPS]
    assert "size" in whole.evals[0].aux
    assert "mean" in whole.evals[0].aux


def test_tied_and_shared_weights_go_on(tmp_path):
    arch = Arch.from_pattern("F@s M F@s", d_model=16, vocab_size=VOCAB, tie_embeddings=True)
    whole = run(tmp_path / "whole", arch=arch)
    source = Counting(ctrl_c_at(4))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", arch=arch, source=source)
    again = run(tmp_path / "cut", arch=arch, source=source)
    same_bits(again, whole)
    assert again.model.head.weight is again.model.embedding.weight


def test_options_around_the_blocks_go_on(tmp_path):
    fields = {
        "norm_position": "sandwich",
        "canon": 3,
        "n_meta_tokens": 2,
        "final_softcap": 20.0,
        "norm": "rmsnorm_zero",
    }
    arch = arch_of("MAE[M,F]", **fields)
    with pytest.raises(CrashError):
        run(tmp_path / "a", arch=arch, source=Counting(crash_at(7)), config=settings(checkpoint_seconds=0.0))
    same_bits(run(tmp_path / "a", arch=arch, config=settings(checkpoint_seconds=0.0)), run(tmp_path / "b", arch=arch))


def test_a_time_limit_stops_and_the_same_call_goes_on(tmp_path, undisturbed):
    for step in (1, 2):
        part = run(tmp_path, max_seconds=0.0)
        assert part.status == "stopped"
        assert part.reason == f"time limit of 0 s reached at {64 * step} tokens; the same call goes on"
    same_bits(run(tmp_path), undisturbed)


def test_a_paused_run_keeps_its_moments_and_goes_on_to_the_bit(tmp_path, undisturbed):
    for step in (4, 8):
        part = run(tmp_path, callbacks=[OnEval(lambda value, step=step: Action.PAUSE if value.step == step else None)])
        assert (part.status, part.reason) == ("paused", f"paused after the measurement at {64 * step} tokens")
        assert json.loads((tmp_path / "run.json").read_text())["final"] is False
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("checkpoint")) == [
            "checkpoint.safetensors"
        ]
        assert checkpoint.load(tmp_path).optimizer
        assert checkpoint.load(tmp_path).header["progress"]["step"] == step
    same_bits(run(tmp_path), undisturbed)
    assert checkpoint.load(tmp_path).optimizer == {}


def test_a_paused_run_whose_checkpoint_was_deleted_is_trained_again_to_the_same_bits(tmp_path, undisturbed):
    run(tmp_path, callbacks=[OnEval(lambda value: Action.PAUSE if value.step == 4 else None)])
    checkpoint.remove(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    same_bits(run(tmp_path), undisturbed)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_measured(tmp_path, undisturbed):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import torch; torch.set_num_threads(1)
from counting import Counting, run
from pathlib import Path
run(Path({str(tmp_path)!r}), source=Counting(lambda step: step == 7 and os.kill(os.getpid(), signal.SIGKILL)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [v.step for v in train.read_evals(tmp_path)] == [2, 4, 6]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "running"
    same_bits(run(tmp_path), undisturbed)


def test_a_watcher_sees_every_measurement_in_order_also_those_of_an_earlier_process(tmp_path):
    seen = []
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)), callbacks=[OnEval(lambda v: seen.append(v.step))])
    assert seen == [2, 4, 6]
    seen.clear()
    run(tmp_path, callbacks=[OnEval(lambda v: seen.append(v.step))])
    assert seen == [2, 4, 6, 8, 10, 12]
    seen.clear()
    run(tmp_path, callbacks=[OnEval(lambda v: seen.append(v.step))])  # a finished run is only reported again
    assert seen == [2, 4, 6, 8, 10, 12]


def test_a_finished_run_is_not_trained_again_and_keeps_its_weights_alone(tmp_path, undisturbed):
    run(tmp_path)

    def refuse(step):
        raise AssertionError("trained again")

    again = run(tmp_path, source=Counting(refuse))
    same_bits(again, undisturbed)
    assert again.status == "completed"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
    assert checkpoint.load(tmp_path).optimizer == {}
    same = train.load_model(tmp_path).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in again.model.state_dict().items())


def test_weights_are_deleted_when_nobody_wants_them(tmp_path):
    result = run(tmp_path, keep_checkpoint=False)
    assert result.model is not None
    assert not list(tmp_path.glob("checkpoint*"))
    again = run(tmp_path, keep_checkpoint=False)
    assert (again.status, again.model, again.evals) == ("completed", None, result.evals)
    with pytest.raises(CheckpointError, match=r"has no checkpoint.safetensors"):
        train.load_model(tmp_path)
