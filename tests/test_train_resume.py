"""A run that was interrupted, killed or refused by the disk goes on, and ends in the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.blocks.base import Aux, Block, BlockConfig, BlockOutput
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.data import Batch, Source
from hybridnas.errors import CheckpointError, TrainingError
from hybridnas.registry import BLOCKS, register_block
from hybridnas.train import checkpoint, records
from hybridnas.train.config import TrainConfig
from hybridnas.train.trainer import PAUSE

VOCAB = 16
STEPS = 12


class Counting(Source):
    """Sequences that count up modulo the vocabulary; ``before_step`` is where a test disturbs the run."""

    vocab_size = VOCAB
    fingerprint = "counting"

    def __init__(self, before_step=lambda step: None):
        self.before_step = before_step

    def describe(self):
        return "counting"

    def _batch(self, seed, batch_size, seq_len):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(VOCAB, (batch_size, 1), generator=generator)
        stride = 1 + 2 * torch.randint(2, (batch_size, 1), generator=generator)
        ids = (start + stride * torch.arange(seq_len + 1)) % VOCAB
        return Batch(ids[:, :-1], ids[:, 1:])

    def train_batch(self, step, batch_size, seq_len, seed):
        self.before_step(step)
        return self._batch(1000 * seed + step, batch_size, seq_len)

    def valid_batches(self, n_tokens, batch_size, seq_len):
        yield self._batch(10**6, batch_size, seq_len)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dropping_block():
    """A block with dropout and an auxiliary loss: what it computes depends on the generator's state."""

    @register_block("Z", name="dropping")
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
    BLOCKS.remove("Z")


def settings(**fields):
    return TrainConfig(
        **{"tokens": STEPS * 64, "batch_size": 4, "seq_len": 16, "lr": 1e-2, "valid_tokens": 64, **fields}
    )


def arch_of(pattern="ME", **fields):
    given = {"n_experts": 4, "d_expert": 16} if "E" in pattern else {}
    return Arch.from_pattern(pattern, d_model=16, vocab_size=VOCAB, **{**given, **fields})


def run(folder, config=None, arch=None, source=None, **kwargs):
    kwargs.setdefault("progress", False)
    return train.run(
        arch or arch_of(), source or Counting(), config or settings(), folder=folder, device="cpu", **kwargs
    )


def numbers(result):
    """Everything measured that does not depend on the clock."""
    return [
        (v.tokens, v.step, v.train_loss, v.valid_loss, v.accuracy, tuple(sorted(v.aux.items()))) for v in result.evals
    ]


def same_bits(one, two):
    assert numbers(one) == numbers(two)
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class CrashError(Exception):
    pass


def crash_at(*steps):
    left = set(steps)

    def disturb(step):
        if step in left:
            left.remove(step)
            raise CrashError

    return disturb


def ctrl_c_at(*steps):
    left = set(steps)

    def disturb(step):
        if step in left:
            left.remove(step)
            signal.raise_signal(signal.SIGINT)

    return disturb


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
    arch = arch_of("ZMZ")
    whole = run(tmp_path / "whole", arch=arch)
    source = Counting(ctrl_c_at(2, 5))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", arch=arch, source=source)
    again = run(tmp_path / "cut", arch=arch, source=source)
    same_bits(again, whole)
    assert [int(b.calls) for b in again.model.blocks() if b.letter == "Z"] == [STEPS, STEPS]
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


def test_a_time_limit_stops_and_the_same_call_goes_on(tmp_path, undisturbed):
    for step in (1, 2):
        part = run(tmp_path, max_seconds=0.0)
        assert part.status == "stopped"
        assert part.reason == f"time limit of 0 s reached at {64 * step} tokens; the same call goes on"
    same_bits(run(tmp_path), undisturbed)


def test_a_paused_run_keeps_its_moments_and_goes_on_to_the_bit(tmp_path, undisturbed):
    for step in (4, 8):
        part = run(tmp_path, on_eval=lambda value, step=step: PAUSE if value.step == step else None)
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
    run(tmp_path, on_eval=lambda value: PAUSE if value.step == 4 else None)
    checkpoint.remove(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    same_bits(run(tmp_path), undisturbed)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def test_kill_9_loses_nothing_that_was_measured(tmp_path, undisturbed):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch; torch.set_num_threads(1)
from test_train_resume import Counting, run
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
        run(tmp_path, source=Counting(crash_at(7)), on_eval=lambda v: seen.append(v.step))
    assert seen == [2, 4, 6]
    seen.clear()
    run(tmp_path, on_eval=lambda v: seen.append(v.step))
    assert seen == [2, 4, 6, 8, 10, 12]
    seen.clear()
    run(tmp_path, on_eval=lambda v: seen.append(v.step))  # a finished run is only told again
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


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def junk(path):
    path.write_bytes(b"\xff" * 4000)


@pytest.mark.parametrize("damage", [cut_short, empty, flip_a_bit, junk])
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(tmp_path, undisturbed, damage):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    damage(tmp_path / "checkpoint.safetensors")
    lines = []
    again = run(tmp_path, progress=lines.append)
    assert "checkpoint.safetensors is damaged" in lines[0]
    assert "going on from checkpoint.prev.safetensors of step 4" in lines[0]
    assert "going on from 256 of 768 tokens" in lines[1]
    same_bits(again, undisturbed)
    assert [v.step for v in train.read_evals(tmp_path)] == [2, 4, 6, 8, 10, 12]  # none twice


@pytest.mark.parametrize("damage", [cut_short, empty, flip_a_bit, junk])
def test_two_damaged_checkpoints_are_one_sentence_and_measurements_stay(tmp_path, damage):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    damage(tmp_path / "checkpoint.safetensors")
    damage(tmp_path / "checkpoint.prev.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint.safetensors is damaged .* and .*prev.* delete .* to train"):
        run(tmp_path)
    assert len(train.read_evals(tmp_path)) == 3


def test_a_checkpoint_lost_between_two_renames_is_the_one_before(tmp_path, undisturbed):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    (tmp_path / "checkpoint.safetensors").unlink()
    (tmp_path / ".checkpoint.1.tmp").write_bytes(b"half")
    same_bits(run(tmp_path), undisturbed)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": {"d_expert": 32}}, r"architecture blocks.E.d_expert=16 \(asked for: 32\)"),
        ({"arch": {"pattern": "EM"}}, r"architecture pattern='ME' \(asked for: 'EM'\)"),
        ({"config": {"lr": 0.5}}, r"train lr=0.01 \(asked for: 0.5\)"),
        (
            {"config": {"seed": 1, "batch_size": 2}},
            r"train batch_size=4 \(asked for: 2\), train seed=0 \(asked for: 1\)",
        ),
    ],
    ids=["expert", "pattern", "lr", "two"],
)
def test_a_folder_of_another_run_is_refused_naming_the_difference(tmp_path, change, words):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(5)))
    config = settings(**change.get("config", {}))
    for _ in range(2):  # with run.json, and by the checkpoint alone
        with pytest.raises(CheckpointError, match=f"holds another run, with {words}.*choose another folder, or delete"):
            run(tmp_path, config, arch_of(**change.get("arch", {})))
        (tmp_path / "run.json").unlink()


def test_other_data_is_another_run(tmp_path):
    run(tmp_path)
    other = Counting()
    other.fingerprint = "more"
    with pytest.raises(CheckpointError, match=r"data fingerprint='counting' \(asked for: 'more'\)"):
        run(tmp_path, source=other)


def test_another_spelling_or_checkpoint_interval_is_the_same_run(tmp_path, undisturbed):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(5)))
    spelled = Arch.from_pattern("M E{n_experts=4,d_expert=16}", d_model=16, vocab_size=VOCAB)
    assert spelled.fingerprint() == arch_of().fingerprint()
    same_bits(run(tmp_path, settings(checkpoint_seconds=7.0), spelled), undisturbed)


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint_before(tmp_path, undisturbed, monkeypatch):
    writes = []
    true = checkpoint._write

    def full(path, tensors, metadata):
        writes.append(path)
        if len(writes) == 3:
            path.write_bytes(b"the part that still fitted")
            raise OSError(errno.ENOSPC, "No space left on device")
        true(path, tensors, metadata)

    monkeypatch.setattr(checkpoint, "_write", full)
    words = r"checkpoint of step 6 could not be written \(no space left on the disk\).*run the same command again"
    with pytest.raises(TrainingError, match=words):
        run(tmp_path)
    assert [v.step for v in train.read_evals(tmp_path)] == [2, 4, 6]
    assert checkpoint.load(tmp_path).header["progress"]["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))
    same_bits(run(tmp_path), undisturbed)


def test_what_safetensors_says_of_a_full_disk_is_understood(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="no space left on the disk"):
        run(tmp_path)


def test_a_measurement_that_the_disk_takes_in_part_leaves_no_half_line(tmp_path, undisturbed, monkeypatch):
    true = os.write
    writes = []

    def full(descriptor, data):
        writes.append(data)
        return true(descriptor, data[: len(data) // 2]) if len(writes) == 2 else true(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "write", full)
        with pytest.raises(TrainingError, match=r"metrics.jsonl: the measurement at 256 tokens could not be written"):
            run(tmp_path)
    assert [v.step for v in train.read_evals(tmp_path)] == [2]
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
    same_bits(run(tmp_path), undisturbed)


@pytest.mark.parametrize("left", [1, 20, -1], ids=["one-byte", "a-few", "all-but-newline"])
def test_a_torn_last_line_is_cut_off_and_measured_again(tmp_path, undisturbed, left):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:left]
    path.write_bytes(b"".join(lines[:2]) + torn)
    checkpoint.remove(tmp_path, names=("checkpoint.safetensors",))  # as it was: a checkpoint follows its measurement
    assert [v.step for v in train.read_evals(tmp_path)] == [2, 4]
    notes = []
    same_bits(run(tmp_path, progress=notes.append), undisturbed)
    assert "metrics.jsonl ended in a torn line, which was cut off" in notes[0]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = '{"tokens": 3}\n'
    path.write_text("".join(lines))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl line 2 is not a measurement: .*remove that line"):
        run(tmp_path)
    assert path.read_text() == "".join(lines)


def test_a_damaged_run_file_is_one_sentence(tmp_path):
    run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged; delete .* to train from the start"):
        run(tmp_path)


def test_two_processes_never_write_one_run(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(TrainingError, match="is being trained in by another process"):
            run(tmp_path)
    assert run(tmp_path).status == "completed"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(TrainingError, match="the run's folder could not be written"):
        run(tmp_path / "run")


def test_checkpoints_hold_no_pickle(tmp_path):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(3)))
    raw = (tmp_path / "checkpoint.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert json.loads(header["__metadata__"]["hybridnas"])["progress"]["step"] == 2
    assert {"model.embedding.weight", "optimizer.embedding.weight.exp_avg"} <= set(header)
