"""python -m hybridnas.train, as a user meets it."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from hybridnas.cli import run as run_cli
from hybridnas.cli.compose import read_settings
from hybridnas.cli.train import run, train_settings
from hybridnas.errors import CheckpointError, ConfigError, TrainingError
from hybridnas.export.load import load
from hybridnas.train import read_evals


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        (tmp_path / f"text{number}.txt").write_text(f"{number} men went to mow, went to mow a meadow. " * 40)
    return ["data=text", f"data.path={tmp_path}/*.txt"]


SMALL = ["train.tokens=512", "train.batch_size=2", "train.seq_len=32", "train.valid_tokens=64", "device=cpu"]
PATTERN = ["pattern=(ME)x1", "+arch.d_model=16", "+arch.n_experts=2"]


def train(*overrides):
    return run(read_settings("train", [*SMALL, *overrides])).code


def test_a_pattern_trains_prints_its_measurements_and_is_not_trained_twice(corpus, capsys):
    assert train(*corpus, *PATTERN, "out=runs/mow") == 0
    out, err = capsys.readouterr()
    assert "model: ME, d_model 16" in out
    assert "8 steps of 64 tokens" in out
    assert "completed: runs/mow" in out
    rows = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert rows[0][:6] == ["tokens", "train loss", "valid loss", "bits/byte", "accuracy", "tokens/s"]
    assert rows[-1][0] == "512"
    assert rows[-1][2] == f"{read_evals('runs/mow')[-1].valid_loss:.4f}"
    assert "512 of 512 tokens" in err
    assert train(*corpus, *PATTERN, "out=runs/mow") == 0
    again = capsys.readouterr()
    assert "tokens  train" not in again.err
    assert [line.split("\t") for line in again.out.splitlines() if "\t" in line] == rows


def test_a_preset_scales_and_every_combination_of_settings_has_its_own_folder(corpus, tmp_path):
    preset = ["preset=moe_mamba", "preset.d_model=16", "preset.n_blocks=1", "preset.n_experts=2"]
    for lr in ("0.001", "0.002", "0.001"):
        assert train(*corpus, *preset, f"train.lr={lr}") == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("train-moe_mamba-") for name in folders)


def test_a_finished_run_is_given_more_tokens(corpus, capsys):
    wsd = [*corpus, *PATTERN, "out=runs/mow", "train.schedule=wsd", "tracking=off"]
    train(*wsd)
    first = load("runs/mow/model").embedding.weight
    capsys.readouterr()
    assert train(*wsd, "train.tokens=1024") == 0
    assert "going on from 448 of 1,024 tokens, the state before the last decay" in capsys.readouterr().err
    assert [value.tokens for value in read_evals("runs/mow")][-2:] == [896, 1024]
    assert not load("runs/mow/model").embedding.weight.equal(first)


def test_another_run_in_the_same_folder_is_refused(corpus):
    train(*corpus, *PATTERN, "out=runs/mow")
    with pytest.raises(CheckpointError, match=r"runs/mow holds another run, with train lr=0.006 \(asked for: 0.01\)"):
        train(*corpus, *PATTERN, "out=runs/mow", "train.lr=0.01")


def test_a_failed_run_is_reported_in_one_sentence(corpus):
    with pytest.raises(TrainingError, match=r"runs/mow: .*\(step \d+, .*lower train.lr=1e\+06"):
        train(*corpus, *PATTERN, "out=runs/mow", "train.lr=1e6", "train.warmup_fraction=0", "train.grad_clip=0")


def test_the_papers_recipe_gives_way_to_what_the_user_says():
    config = read_settings("train", ["preset=moe_mamba", "recipe=paper", "train.lr=0.0005"])
    settings = train_settings(config)
    assert (settings.lr, settings.batch_size, settings.seq_len, settings.decay_all) == (5e-4, 256, 256, True)
    assert settings.tokens == 6_553_600_000


@pytest.mark.parametrize(
    ("overrides", "field", "got"),
    [
        ([], "preset", None),
        (["pattern=ME", "recipe=paper"], "recipe", "paper"),
        (["pattern=ME", "recipe=mine"], "recipe", "mine"),
        (["train.lrr=1"], "train.lrr", "train.lrr"),
        (["train.schedule=linear"], "train.schedule", "linear"),
        (["pattern=ME"], "arch.d_model", None),
    ],
)
def test_mistakes_name_the_setting(corpus, overrides, field, got):
    with pytest.raises(ConfigError) as caught:
        train(*corpus, *overrides)
    assert (caught.value.field, caught.value.got) == (field, got)


def test_a_device_that_is_not_there_is_refused_before_data_is_read(corpus, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("hybridnas.data.open_source", lambda config: pytest.fail("data was read"))
    with pytest.raises(ConfigError, match="needs CUDA"):
        train(*corpus, *PATTERN, "device=cuda")


def test_a_refused_command_leaves_a_finished_run_as_it_was(corpus):
    from hybridnas.report.compare import CompareConfig, find_runs

    train(*corpus, *PATTERN, "out=runs/mow")
    before = {path: path.read_bytes() for path in Path("runs/mow").rglob("*") if path.is_file()}
    assert run_cli(["train", *SMALL, *corpus, *PATTERN, "out=runs/mow", "train.lr=0.01"]) == 2
    assert {path: path.read_bytes() for path in Path("runs/mow").rglob("*") if path.is_file()} == before
    assert [run.status for run in find_runs(CompareConfig())] == ["complete"]


def test_a_new_process_ends_with_2_and_no_traceback(corpus):
    command = [sys.executable, "-m", "hybridnas.train", "train.tokens=-1", "pattern=ME"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "ConfigError: train tokens=-1 must be >= 1\n"


def test_a_model_that_sees_later_tokens_is_measured_only_when_that_is_asked_for(corpus, capsys, caplog):
    seer = ["pattern=ME", "arch.d_model=16", "arch.n_experts=2", "arch.E.router=expert_choice"]
    with pytest.raises(ConfigError) as caught:
        train(*corpus, *seer, "out=runs/seer")
    assert caught.value.field == "allow_noncausal"
    capsys.readouterr()
    with caplog.at_level(logging.WARNING, "hybridnas"):
        assert train(*corpus, *seer, "out=runs/seer", "train.allow_noncausal=true") == 0
    assert "sees later tokens" in caplog.text
    measure = ["model=runs/seer/model", *corpus, "device=cpu", "valid_tokens=64", "seq_len=32"]
    assert run_cli(["evaluate", *measure]) == 2
    assert run_cli(["evaluate", *measure, "allow_noncausal=true"]) == 0
    assert "sees later tokens" in capsys.readouterr().out
