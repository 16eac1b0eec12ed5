"""Whole ladders at toy size: from the command and from Python, resumed, with workers, from a study."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

import hybridnas
from hybridnas.cli import run
from hybridnas.errors import StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.ladder import Ladder
from hybridnas.study.records import trial_folder, write_record
from hybridnas.train.callbacks import Callback

OWN = {"d_model": 16, "depth": 2, "multiple": 1, "seq_len": 32, "batch_size": 4, "valid_tokens": 256, "n_experts": 2}
SETTINGS = {"patterns": ["MF", "AF"], "sizes": [1, 2], "tokens": [0.5, 1], "warmup": 0.1, "seeds": 2, "device": "cpu"}


def typed(corpus, **more):
    values = {**SETTINGS, **more}
    words = [f"{key}=[{','.join(map(str, v))}]" if isinstance(v, list) else f"{key}={v}" for key, v in values.items()]
    own = [f"budget.{key}={value}" for key, value in OWN.items()]
    return [*words, "budget=smoke", *own, "data=text", f"data.path={corpus}"]


def table(folder):
    with (folder / "ladder.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A ladder in one go, through the command."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(["ladder", *typed(corpus, runs=folder, name="l")]) == 0
    return folder / "l"


def test_a_ladder_leaves_rows_figures_and_an_answer(whole):
    rows = table(whole)
    assert len(rows) == 2 * 2 * 2 * 2
    assert {(row["model"], row["size"], row["seed"]) for row in rows} == {
        (model, size, seed) for model in ("MF", "AF") for size in ("1.0", "2.0") for seed in ("0", "1")
    }
    assert all(float(row["valid_loss"]) > 0 and float(row["flops"]) > 0 for row in rows)
    assert (whole / "ladder.png").stat().st_size > 10_000
    assert (whole / "ladder.svg").is_file()
    result = json.loads((whole / "ladder.json").read_text())["result"]
    assert result["done"] is True
    assert [model["law"] for model in result["models"]] == [None, None]
    assert len(result["pairs"]) == 1


class After(Callback):
    """Interrupts as Ctrl-C does, at a step of a run."""

    def __init__(self, step):
        self.left = step

    def on_step(self, run, step):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_ladder_that_was_interrupted_ends_as_one_that_was_not(whole, corpus, tmp_path):
    settings = {**SETTINGS, **OWN, "runs": tmp_path, "name": "l", "budget": "smoke"}
    settings["data"] = {"kind": "text", "path": str(corpus)}
    for step in (5, 60):
        with pytest.raises(KeyboardInterrupt):
            hybridnas.ladder(**settings, callbacks=[After(step)])
        assert json.loads((tmp_path / "l" / "ladder.json").read_text())["result"]["done"] is False
    result = hybridnas.ladder(**settings)
    assert result.done
    assert (tmp_path / "l" / "ladder.csv").read_bytes() == (whole / "ladder.csv").read_bytes()


def test_workers_train_the_same(whole, corpus, tmp_path):
    assert run(["ladder", *typed(corpus, runs=tmp_path, name="l", workers=2)]) == 0
    assert (tmp_path / "l" / "ladder.csv").read_bytes() == (whole / "ladder.csv").read_bytes()


def test_ctrl_c_lets_workers_save_and_the_same_command_goes_on(whole, corpus, tmp_path):
    arguments = typed(corpus, runs=tmp_path, name="l", workers=2)
    command = [sys.executable, "-m", "hybridnas.ladder", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = tmp_path / "l" / "trainings"
    until = time.monotonic() + 120
    while not list(started.glob("*/*/run.json")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert run(["ladder", *arguments]) == 0
    assert (tmp_path / "l" / "ladder.csv").read_bytes() == (whole / "ladder.csv").read_bytes()


def test_more_seeds_train_only_what_is_missing(whole, corpus, capsys):
    arguments = typed(corpus, runs=whole.parent, name="l")
    before = (whole / "ladder.csv").read_bytes()
    assert run(["ladder", *arguments]) == 0
    assert "8 of them done" in capsys.readouterr().out
    assert (whole / "ladder.csv").read_bytes() == before


def test_a_ladder_of_other_settings_is_refused(whole, corpus):
    settings = {**SETTINGS, **OWN, "runs": whole.parent, "name": "l", "budget": "smoke", "lr": 0.5}
    settings["data"] = {"kind": "text", "path": str(corpus)}
    with pytest.raises(StudyError) as caught:
        hybridnas.ladder(**settings)
    assert caught.value.field in ("ladder.lr", "ladder.budget.lr")


def test_a_study_climbs_with_its_best_and_its_baselines(corpus, tmp_path):
    study = hybridnas.create_study(
        space={"letters": ["M", "F"], "motif_length": [2], "reference": "mamba", "baselines": ["mamba"]},
        budget={"name": "tiny", **OWN, "tokens_per_active_param": 0.2, "rungs": 1, "evals": 1, "n_trials": 3},
        data={"kind": "text", "path": str(corpus)},
        name="s",
        runs=tmp_path,
        tracking="off",
        device="cpu",
    )  # fmt: skip
    study.run()
    result = study.ladder(top=1, sizes=[1, 2], tokens=[0.5, 1], warmup=0.1, seeds=1, rates=[1, 2], device="cpu")
    names = {row.model for row in result.rows}
    assert "mamba" in names
    assert len(names) == 2
    assert result.folder == tmp_path / "ladder-s"
    assert {row.fingerprint for row in result.rows if row.size == 1} <= {
        trial.record.fingerprint for trial in study.trials
    }
    assert set(result.rates.values()) <= {0.25, 0.5, 1.0, 2.0, 4.0, 8.0}
    assert all(row.rate == result.rates[row.model] for row in result.rows)
    budget_lr = {row.lr / row.rate for row in result.rows if row.size == 1}
    assert len(budget_lr) == 1  # rate=shared

    # a study that has found each candidate's own rate
    preset = next(trial.record for trial in study.trials if trial.record.preset == "mamba")
    write_record(trial_folder(study.path, preset.number), dataclasses.replace(preset, lr=0.02, own_lr=0.05))
    again = LadderConfig.from_dict({**result_settings(result), "lr": None})
    assert Ladder(again).plan.anchors["mamba"] == 0.05
    assert Ladder(again.replace(lr=0.01)).plan.anchors["mamba"] == 0.01  # one that is asked for is that of all
    said = []
    ladder = Ladder(again)
    with ladder._held(said.append):
        pass
    assert any("mamba starts at rate 0.05" in line for line in said)


def result_settings(result):
    return json.loads((result.folder / "ladder.json").read_text())["settings"]


def test_a_ladder_whose_models_ended_at_a_tenth_of_the_rate_is_refused(whole, corpus, tmp_path):
    shutil.copytree(whole, tmp_path / "l")
    path = tmp_path / "l" / "ladder.json"
    stored = json.loads(path.read_text())
    del stored["identity"]["final_lr_fraction"]
    path.write_text(json.dumps(stored))
    config = LadderConfig.from_dict({**stored["settings"], "runs": tmp_path})
    with pytest.raises(StudyError) as caught:
        Ladder(config).run()
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("ladder.final_lr_fraction", 0.0, 0.1)
