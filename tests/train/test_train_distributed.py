"""One run on two processes: the same losses as one, rank 0 asks and all obey, and it goes on after any end."""

import math
import socket
import subprocess
import sys

import pytest
import torch

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.cli import run as run_cli
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError, TrainingError
from hybridnas.study.records import load_records
from hybridnas.train import distributed
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.config import TrainConfig
from hybridnas.train.fit import fit
from hybridnas.train.records import read_evals, read_run

SETTINGS = {"tokens": 2048, "batch_size": 4, "seq_len": 32, "valid_tokens": 256, "lr": 3e-3, "eval_at": (1024,)}


@pytest.fixture(scope="module")
def source(corpus):
    return open_source(source_config({"kind": "text", "path": str(corpus), "tokenizer": "bytes"}))


def arch(pattern):
    experts = {"n_experts": 2} if "E" in pattern else {}
    return Arch.from_pattern(pattern, d_model=16, vocab_size=256, **experts)


def run(pattern, source, folder, on_eval=None, **changes):
    config = TrainConfig.from_dict({**SETTINGS, **changes})
    callbacks = [OnEval(on_eval)] if on_eval else []
    return train.run(arch(pattern), source, config, folder=folder, device="cpu", callbacks=callbacks)


def assert_close(one, two):
    assert [value.tokens for value in one.evals] == [value.tokens for value in two.evals]
    for a, b in zip(one.evals, two.evals, strict=True):
        assert math.isclose(a.train_loss, b.train_loss, abs_tol=1e-5)
        assert math.isclose(a.valid_loss, b.valid_loss, abs_tol=1e-5)
        assert math.isclose(a.aux["grad_norm"], b.aux["grad_norm"], rel_tol=1e-4)


def test_two_processes_give_the_losses_of_one(source, tmp_path):
    asked = []
    two = run("MAF", source, tmp_path / "two", lambda value: asked.append(value.tokens), devices=2)
    assert two.status == "completed"
    assert_close(run("MAF", source, tmp_path / "one"), two)
    assert asked == [1024, 2048]
    assert two.model is not None
    assert read_run(tmp_path / "two")["train"]["devices"] == 2


def test_a_mixture_balances_within_each_part_as_it_does_when_accumulating(source, tmp_path):
    two = run("ME", source, tmp_path / "two", devices=2)
    assert_close(run("ME", source, tmp_path / "one", batch_size=2, accumulate=2), two)


def test_what_rank_0_hears_all_obey_and_a_paused_run_goes_on(source, tmp_path):
    paused = run("MF", source, tmp_path / "a", lambda value: Action.PAUSE, devices=2)
    assert (paused.status, [value.tokens for value in paused.evals]) == ("paused", [1024])
    asked = []
    again = run("MF", source, tmp_path / "a", lambda value: asked.append(value.tokens), devices=2)
    assert (again.status, asked) == ("completed", [1024, 2048])
    whole = run("MF", source, tmp_path / "b", devices=2)
    assert [value.valid_loss for value in whole.evals] == [value.valid_loss for value in again.evals]


def test_ctrl_c_of_the_owner_saves_and_leaves_nobody(source, tmp_path):
    def press(value):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("MF", source, tmp_path, press, devices=2)
    assert not read_run(tmp_path)["final"]
    assert len(read_evals(tmp_path)) == 1
    assert run("MF", source, tmp_path, devices=2).status == "completed"


def test_a_run_that_diverges_says_so_from_rank_0(source, tmp_path):
    result = run("MF", source, tmp_path, devices=2, lr=1e9, grad_clip=0.0, divergence_factor=1.01)
    assert result.status == "failed"
    assert "lower train.lr" in result.reason


def test_experts_that_stay_idle_and_accumulation_go_together(source, tmp_path):
    many = Arch.from_pattern("ME", d_model=16, vocab_size=256, n_experts=16)

    def trained(folder, **changes):
        config = TrainConfig.from_dict({**SETTINGS, **changes})
        return train.run(many, source, config, folder=folder, device="cpu")

    two = trained(tmp_path / "two", devices=2, batch_size=2, accumulate=2)
    assert_close(trained(tmp_path / "one", batch_size=1, accumulate=4), two)


def test_two_processes_balance_experts_by_the_choices_of_both(source, tmp_path):
    fields = {"router": "top_k", "top_k": 2, "scores": "sigmoid", "correction_bias": True, "capacity_factor": None}
    small = Arch.from_pattern("ME", d_model=16, vocab_size=256, n_experts=4, **fields)

    def trained(devices):
        config = TrainConfig.from_dict({**SETTINGS, "tokens": 256, "eval_at": (), "devices": devices})
        result = train.run(small, source, config, folder=tmp_path / str(devices), device="cpu")
        return result.model.get_buffer("layers.1.branches.0.0.routed.correction_bias")

    one = trained(1)
    assert one.any()
    assert torch.equal(trained(2), one)


def test_a_task_head_that_only_some_batches_use_is_trained_on_two(tmp_path):
    parts = {"compression": {"seq_len": 16, "vocab_size": 8}, "parity": {"seq_len": 16}}
    data = open_source(source_config({"kind": "mixture", "parts": parts}))
    small = Arch.from_pattern("M", d_model=16, vocab_size=data.vocab_size)

    def trained(devices):
        config = TrainConfig.from_dict({**SETTINGS, "seq_len": 16, "tokens": 512, "eval_at": (), "devices": devices})
        return train.run(small, data, config, folder=tmp_path / str(devices), device="cpu")

    one, two = trained(1), trained(2)
    assert_close(one, two)
    for a, b in zip(one.heads.parameters(), two.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.long
def test_without_a_folder_two_devices_train_as_well(source):
    assert_close(run("M", source, None), run("M", source, None, devices=2))


def test_a_rank_that_dies_is_a_failure_from_which_the_same_call_goes_on(source, tmp_path, monkeypatch):
    real = subprocess.Popen

    def dying(command, **rest):
        return real([command[0], "-c", "import sys; sys.exit(7)"], **rest)

    monkeypatch.setattr(distributed.subprocess, "Popen", dying)
    result = run("M", source, tmp_path, devices=2)
    assert (result.status, result.final) == ("failed", False)
    assert "exit code 7" in result.reason
    monkeypatch.undo()
    assert run("M", source, tmp_path, devices=2).status == "completed"


def test_a_module_that_no_other_process_can_build_is_refused(source):
    model = torch.nn.Sequential(torch.nn.Embedding(256, 4), torch.nn.Linear(4, 256))
    config = TrainConfig.from_dict({**SETTINGS, "devices": 2})
    with pytest.raises(TrainingError) as caught:
        train.run(model, source, config, device="cpu")
    assert (caught.value.field, caught.value.allowed) == ("model", "an Arch")


def test_torchrun_starts_the_ranks_of_a_script_with_a_module_of_its_own(corpus, tmp_path):
    script = tmp_path / "own.py"
    script.write_text(
        f"""
import os, torch, hybridnas
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))
data = {{"kind": "text", "path": {str(corpus)!r}, "tokenizer": "bytes"}}
result = hybridnas.fit(model, data, devices=2, folder={str(tmp_path / "run")!r}, device="cpu", **{SETTINGS!r})
os.write(1, f"{{result.status}} {{len(result.evals)}}\\n".encode())  # whole lines, whichever rank is first
os._exit(0)  # see distributed.end_follower
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["completed 2"] * 2  # every rank has the result, rank 0 has the folder
    assert read_run(tmp_path / "run")["status"] == "completed"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))
    data = {"kind": "text", "path": str(corpus), "tokenizer": "bytes"}
    alone = fit(model, data, device="cpu", **SETTINGS)
    for a, b in zip(read_evals(tmp_path / "run"), alone.evals, strict=True):
        assert math.isclose(a.train_loss, b.train_loss, abs_tol=1e-5)
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.stdout.splitlines() == ["completed 2"] * 2, again.stderr  # read back by all


def test_a_group_of_another_size_is_refused(source, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        run("M", source, None, devices=2)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("devices", 2, 1)


def test_a_batch_that_cannot_be_divided_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="batch_size=4 cannot be divided by devices=3; choose a multiple"):
        run("MF", source, tmp_path, devices=3)


def test_a_searchs_trial_trains_on_two_devices(tmp_path, tiny, capsys):
    settings = ["budget=smoke", f"runs={tmp_path}", "study=two", *tiny, "n_trials=1", "budget.devices=2"]
    assert run_cli(["search", *settings]) == 0
    assert [record.state for record in load_records(tmp_path / "two")[0]] == ["COMPLETE"]
    assert "winner: trial 0" in capsys.readouterr().out
