"""One run on two processes: the same losses as one, rank 0 asks and all obey, and it goes on after any end."""

import math

import pytest

from hybridnas import train
from hybridnas.arch.arch import Arch
from hybridnas.cli import run as run_cli
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError
from hybridnas.study.records import load_records
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.config import TrainConfig
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


def test_a_batch_that_cannot_be_divided_is_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="batch_size=4 cannot be divided by devices=3; choose a multiple"):
        run("MF", source, tmp_path, devices=3)


def test_a_searchs_trial_trains_on_two_devices(tmp_path, tiny, capsys):
    settings = ["budget=smoke", f"runs={tmp_path}", "study=two", *tiny, "n_trials=1", "budget.devices=2"]
    assert run_cli(["search", *settings]) == 0
    assert [record.state for record in load_records(tmp_path / "two")[0]] == ["COMPLETE"]
    assert "winner: trial 0" in capsys.readouterr().out
