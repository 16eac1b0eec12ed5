"""python -m hybridnas.train, as a user meets it."""

import subprocess
import sys

import pytest
import yaml

from hybridnas.cli.compose import CONF, compose
from hybridnas.cli.train import run, train_settings
from hybridnas.errors import CheckpointError, ConfigError, TrainingError
from hybridnas.train import TrainConfig, read_evals


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRIDNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        (tmp_path / f"text{number}.txt").write_text(f"{number} men went to mow, went to mow a meadow. " * 40)
    return ["data=text", f"data.path={tmp_path}/*.txt"]


SMALL = ["train.tokens=512", "train.batch_size=2", "train.seq_len=32", "train.valid_tokens=64", "device=cpu"]
PATTERN = ["pattern=(ME)x1", "+arch.d_model=16", "+arch.n_experts=2"]


def train(*overrides):
    return run(compose("train", [*SMALL, *overrides]))


def test_the_settings_file_names_every_field_and_the_true_defaults():
    text = (CONF / "train.yaml").read_text()
    fields = yaml.safe_load(text)["train"]
    assert list(fields) == list(TrainConfig.field_names())
    for line in text.splitlines():
        key, _, comment = line.strip().partition(":")
        if key in fields and comment.startswith(" null"):
            default = TrainConfig().to_dict()[key]
            said = comment.partition("#")[2].strip().split(":")[0].split("|")[0].strip().replace(",", "")
            wanted = str(default).lower() if not isinstance(default, float) else f"{default:g}"
            assert said == wanted or default is None, line


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


def test_another_run_in_the_same_folder_is_refused(corpus):
    train(*corpus, *PATTERN, "out=runs/mow")
    with pytest.raises(CheckpointError, match=r"runs/mow holds another run, with train lr=0.006 \(asked for: 0.01\)"):
        train(*corpus, *PATTERN, "out=runs/mow", "train.lr=0.01")


def test_a_failed_run_is_told_in_one_sentence(corpus):
    with pytest.raises(TrainingError, match=r"runs/mow: .*\(step \d+, .*lower train.lr=1e\+06"):
        train(*corpus, *PATTERN, "out=runs/mow", "train.lr=1e6", "train.warmup_fraction=0", "train.grad_clip=0")


def test_the_papers_recipe_gives_way_to_what_the_user_says():
    config = compose("train", ["preset=moe_mamba", "recipe=paper", "train.lr=0.0005"])
    settings = train_settings(config)
    assert (settings.lr, settings.batch_size, settings.seq_len, settings.decay_all) == (5e-4, 256, 256, True)
    assert settings.tokens == 6_553_600_000


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], r"train needs an architecture: preset=moe_mamba, or pattern="),
        (["pattern=ME", "recipe=paper"], "recipe=paper belongs to a preset"),
        (["pattern=ME", "recipe=mine"], "recipe='mine' must be none or paper"),
        (["train.lrr=1"], "train has no setting 'train.lrr'; did you mean 'train.lr'"),
        (["train.schedule=linear"], "train schedule='linear' must be one of cosine, constant"),
        (["pattern=ME"], "needs a width: arch.d_model=64"),
    ],
)
def test_mistakes_are_one_sentence(corpus, overrides, words):
    with pytest.raises(ConfigError, match=words):
        train(*corpus, *overrides)


def test_the_door_exits_with_2_and_no_traceback(corpus):
    command = [sys.executable, "-m", "hybridnas.train", "train.tokens=-1", "pattern=ME"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "ConfigError: train tokens=-1 must be >= 1\n"
