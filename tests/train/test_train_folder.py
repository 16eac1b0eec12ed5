"""What can be wrong with a run's folder: damaged and lost files, another run, a full disk, a second process."""

import errno
import json
import os

import pytest
from counting import VOCAB, Counting, CrashError, arch_of, crash_at, run, same_bits, settings

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.errors import CheckpointError, TrainingError
from hybridnas.train import checkpoint, records

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


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
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(tmp_path, undisturbed, damage, caplog):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    damage(tmp_path / "checkpoint.safetensors")
    with caplog.at_level("INFO", logger="hybridnas.train"):
        again = run(tmp_path)
    lines = caplog.messages
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


def test_a_checkpoint_that_the_system_refuses_names_the_systems_reason(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # enough for run.json, too little for the weights
    try:
        with pytest.raises(TrainingError, match=r"the checkpoint of step 2 could not be written \(File too large\)"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.tmp"))
    assert [v.step for v in train.read_evals(tmp_path)] == [2]


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
def test_a_torn_last_line_is_cut_off_and_measured_again(tmp_path, undisturbed, left, caplog):
    with pytest.raises(CrashError):
        run(tmp_path, source=Counting(crash_at(7)))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    torn = lines[2][:left]
    path.write_bytes(b"".join(lines[:2]) + torn)
    checkpoint.remove(tmp_path, names=("checkpoint.safetensors",))  # as it was: a checkpoint follows its measurement
    assert [v.step for v in train.read_evals(tmp_path)] == [2, 4]
    same_bits(run(tmp_path), undisturbed)
    assert "metrics.jsonl ended in a torn line, which was cut off" in caplog.messages[0]


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
