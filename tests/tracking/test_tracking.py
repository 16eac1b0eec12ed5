"""Tracking: what MLflow gets, that continuing repeats nothing, and that no tracker can cost a trial."""

import contextlib
import csv
import logging
import multiprocessing
import os
import shutil
import socket
import sqlite3
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

import hybridnas
from hybridnas.cli import run as run_command
from hybridnas.config import flatten
from hybridnas.data.tokenizers import ByteTokenizer
from hybridnas.errors import CheckpointError
from hybridnas.export.folder import export
from hybridnas.export.stream import stream_text
from hybridnas.files import write_json
from hybridnas.study.callbacks import StudyEnded, StudyStarted, TrialEnded, TrialMeasured, TrialStarted
from hybridnas.study.records import StudyMeta, TrialRecord, write_record
from hybridnas.tracking import mlflow as tracking
from hybridnas.tracking.mlflow import default_uri, open_tracker
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.study import StudyTracking
from hybridnas.tracking.tracker import numbers, trial_facts
from hybridnas.train.callbacks import Callback
from hybridnas.train.records import read_evals
from hybridnas.train.tracking import Tracking

COMMAND = "python -m hybridnas.search n_trials=3"
TAGS = {"pattern": "(ME)x4", "fingerprint": "ab" * 32, "preset": "moe_mamba"}


def record(number, state, loss, **fields):
    curve = [{"tokens": 1000, "valid_loss": loss + 1}, {"tokens": 2000, "valid_loss": loss}]
    defaults = {"pattern": "Mx4", "fingerprint": f"{number:064x}", "tokens": 2000, "curve": curve, "valid_loss": loss,
                "cost": {"params": 10, "active_params": 5}, "choices": {"split": 0.5}}  # fmt: skip
    return TrialRecord(number=number, state=state, **{**defaults, **fields})


def runs_of(folder, query=""):
    client = tracking.connect(default_uri(folder))
    experiment = client.get_experiment_by_name("hybridnas")
    return client, tracking.search_runs(client, experiment.experiment_id, query)


def by_trial(folder):
    client, runs = runs_of(folder, "tags.`hybridnas.kind` = 'trial'")
    return client, {run.data.tags["hybridnas.trial"]: run for run in runs}


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """A study of three trials in a real database: one complete, one pruned, one whose process died."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    folder.mkdir()
    working = Path.cwd()
    tracker = open_tracker(None, folder, "demo", {"seed": 3, "storage": "postgresql://me:hunter2@db/optuna"})
    assert tracker.ready(timeout=600)  # importing mlflow and making its database take long on a busy machine
    tracker.start_trial(0, {"params": 10, "choices": {"split": 0.5, "none": None}}, TAGS)
    tracker.log_eval(0, {"tokens": 1000, "valid_loss": 2.5, "aux": {"layer03.E.dropped": 0.25, "load": [0.1, 0.9]}})
    tracker.log_eval(0, {"tokens": 2000, "valid_loss": 2.0})
    arch = folder / "arch.json"
    arch.write_text("{}")
    tracker.end_trial(0, "COMPLETE", record(0, "COMPLETE", 2.0), [arch, folder / "absent"])
    tracker.start_trial(1, {}, {"pattern": "Mx4", "fingerprint": "1"})
    tracker.end_trial(1, "PRUNED", record(1, "PRUNED", 3.0, reason="pruned at 1,000 tokens"))
    tracker.start_trial(2, {"params": 7}, {"pattern": "Mx4", "fingerprint": "2"})
    tracker.log_eval(2, {"tokens": 1000, "valid_loss": 2.9})
    tracker.close("KILLED")
    assert not tracker.off
    assert not (working / "mlruns").exists()
    return folder


def test_a_study_is_one_parent_run_with_a_child_for_each_trial(mirrored):
    client, runs = by_trial(mirrored)
    _, parents = runs_of(mirrored, "tags.`hybridnas.kind` = 'study'")
    assert [run.info.run_name for run in parents] == ["demo"]
    assert sorted(runs) == ["0", "1", "2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parents[0].info.run_id}
    assert runs["0"].info.run_name == "0000 moe_mamba"
    assert runs["0"].data.tags["hybridnas.pattern"] == "(ME)x4"
    assert runs["0"].data.params.items() >= {"params": "10", "choices.split": "0.5"}.items()
    points = client.get_metric_history(runs["0"].info.run_id, "valid_loss")
    assert [(point.step, point.value) for point in points] == [(1000, 2.5), (2000, 2.0)]
    assert runs["0"].data.metrics["best_valid_loss"] == 2.0
    assert runs["0"].data.metrics["layer03.E.dropped"] == 0.25
    assert runs["0"].data.metrics["load.max"] == 0.9


def test_states_map_to_the_statuses_of_mlflow(mirrored):
    _, runs = by_trial(mirrored)
    assert {number: run.info.status for number, run in runs.items()}["0"] == "FINISHED"
    assert runs["1"].info.status == "KILLED"
    assert runs["1"].data.tags["hybridnas.reason"] == "pruned at 1,000 tokens"
    assert tracking.STATUS.get("FAIL", "FAILED") == "FAILED"


def test_artifacts_and_database_lie_inside_the_study_folder(mirrored):
    assert (mirrored / "mlflow.db").is_file()
    assert list((mirrored / "mlartifacts").rglob("arch.json"))
    config = next((mirrored / "mlartifacts").rglob("config.json")).read_text()
    assert "postgresql://***@db/optuna" in config
    assert "hunter2" not in config


def test_continuing_finds_parent_and_trials_again_and_makes_up_for_what_was_lost(mirrored):
    before = {number: run.info.run_id for number, run in by_trial(mirrored)[1].items()}
    with open_tracker(None, mirrored, "demo", {}) as tracker:
        assert tracker.ready()
        tracker.sync([
            record(0, "COMPLETE", 2.0, fingerprint=TAGS["fingerprint"]),
            record(2, "COMPLETE", 1.5, fingerprint="2"),  # its process died: MLflow knows it as running
            record(3, "FAIL", 9.0, valid_loss=None, reason="out of memory"),  # the server was away
            record(4, "RUNNING", 9.0),
        ])  # fmt: skip
        tracker.start_trial(1, {}, {"pattern": "Mx4", "fingerprint": "1"})
        tracker.end_trial(1, "COMPLETE", record(1, "COMPLETE", 2.1))
        tracker.start_trial(0, {}, {"pattern": "Mx8", "fingerprint": "other"})
        tracker.end_trial(0, "COMPLETE", record(0, "COMPLETE", 1.9))
    assert not tracker.off
    client, runs = by_trial(mirrored)
    _, parents = runs_of(mirrored, "tags.`hybridnas.kind` = 'study'")
    _, every = runs_of(mirrored, "tags.`hybridnas.kind` = 'trial'")
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert sorted(run.data.tags["hybridnas.trial"] for run in every) == ["0", "0", "1", "2", "3"]
    assert client.get_run(before["0"]).data.tags["hybridnas.superseded"] == "true"
    assert runs["1"].info.run_id == before["1"]
    assert runs["1"].info.status == "FINISHED"
    assert runs["2"].info.run_id == before["2"]
    assert runs["2"].data.metrics["best_valid_loss"] == 1.5
    assert runs["3"].info.status == "FAILED"
    assert runs["3"].data.tags["hybridnas.reason"] == "out of memory"


def test_a_single_training_logs_to_its_own_run(mirrored):
    folder = mirrored.parent / "train"
    with open_tracker(default_uri(mirrored), folder, "one", {}, kind="train") as tracker:
        tracker.log_eval(None, {"tokens": 10, "valid_loss": 2.25})
    _, runs = runs_of(mirrored, "tags.`hybridnas.kind` = 'train'")
    assert [(run.info.run_name, run.data.metrics["valid_loss"]) for run in runs] == [("one", 2.25)]


def test_an_unreachable_server_costs_one_warning_without_the_password(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with caplog.at_level(logging.WARNING, "hybridnas"):
            tracker = open_tracker(f"http://me:hunter2@127.0.0.1:{taken.getsockname()[1]}", tmp_path, "s", {})
            assert not tracker.ready()
            for number in range(3):
                tracker.start_trial(number, {}, TAGS)
                tracker.log_eval(number, {"tokens": 1, "valid_loss": 1.0})
                tracker.end_trial(number, "COMPLETE")
            tracker.close()
    assert tracker.off
    assert len(caplog.records) == 1
    assert "NewConnectionError" in caplog.text
    assert "http://***@127.0.0.1" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_database_that_is_no_database_costs_one_warning(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("this is not sqlite, and long enough to be looked at" * 30)
    with caplog.at_level(logging.WARNING, "hybridnas"):
        tracker = open_tracker(None, tmp_path, "s", {})
        tracker.start_trial(0, {}, TAGS)
        tracker.close()
    assert tracker.off
    assert len(caplog.records) == 1
    assert "file is not a database" in caplog.text


def test_a_deleted_experiment_costs_one_warning_that_says_how_to_restore_it(tmp_path, caplog):
    record_one(tmp_path, 0, shared=False)
    client, _ = runs_of(tmp_path / "s1")
    experiment = client.get_experiment_by_name("hybridnas").experiment_id
    client.delete_experiment(experiment)
    with caplog.at_level(logging.WARNING, "hybridnas"), open_tracker(None, tmp_path / "s1", "s1", {}) as tracker:
        tracker.start_trial(1, {}, TAGS)
    assert tracker.off
    assert len(caplog.records) == 1
    assert f"mlflow experiments restore --experiment-id {experiment}" in caplog.text
    client.restore_experiment(experiment)
    record_one(tmp_path, 1, shared=False)


def test_off_starts_nothing(tmp_path):
    with open_tracker("off", tmp_path, "s", {}) as tracker:
        tracker.start_trial(0, {}, TAGS)
        tracker.sync([])
    assert not tracker.ready()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://me:p@ss/w0rd@db:5432/x", "postgresql+psycopg://***@db:5432/x"),
        ("cannot reach http://me:pw@host/a, retrying", "cannot reach http://***@host/a, retrying"),
        ("https://host/a?token=abc&x=1", "https://host/a?token=***&x=1"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("no secret: a@b", "no secret: a@b"),
    ],
)
def test_passwords_in_urls_are_masked(text, shown):
    assert masked(text) == shown
    assert masked({"a": [text]}) == {"a": [shown]}


def test_nested_values_are_flattened_and_of_vectors_the_extremes_are_kept():
    assert flatten({"a": {"b": 1, "c": {}}, "d:e": "x"}) == {"a.b": 1, "a.c": {}, "d:e": "x"}
    assert numbers({"a": {"b": 1}, "c": [1, 3], "d": "x", "e": True, "f": []}) == {
        "a.b": 1.0,
        "c.min": 1.0,
        "c.max": 3.0,
    }


def test_a_record_that_was_written_can_be_mirrored_whole(tmp_path):
    write_record(tmp_path, record(0, "COMPLETE", 2.0))
    assert trial_facts(record(0, "COMPLETE", 2.0, seed=5)).params == {
        "pattern": "Mx4", "fingerprint": "0" * 64, "seed": "5", "params": "10", "active_params": "5",
        "choices.split": "0.5",
    }  # fmt: skip


@pytest.mark.parametrize("cached", ["absent", "damaged", "kept", "not a folder"])
def test_a_database_is_made_anew_or_copied_also_where_a_killed_process_began_one(tmp_path, monkeypatch, cached):
    cache = tmp_path / "cache"
    if cached == "kept":
        (tmp_path / "first").mkdir()
        tracking.make_database(default_uri(tmp_path / "first"))
    else:
        monkeypatch.setenv("HYBRIDNAS_CACHE", str(cache))
    if cached == "damaged":
        cache.mkdir()
        (cache / f"mlflow-{version('mlflow')}.db").write_bytes(b"half of a database")
    elif cached == "not a folder":
        cache.write_text("")
    (tmp_path / ".mlflow.new.db").write_bytes(b"half of a database")
    tracking.make_database(default_uri(tmp_path))
    assert not (tmp_path / ".mlflow.new.db").exists()
    experiments = tracking.connect(default_uri(tmp_path)).search_experiments()
    assert [experiment.name for experiment in experiments] == ["Default"]


class CSVTracker:
    """A tracker in one class: a line for each metric, and for each end of a run."""

    def __init__(self, path):
        self.path = path
        self.place = str(path)
        self.states = {}

    def open(self):
        self.path.write_text("")

    def write(self, *values):
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(values)

    def known(self, number):
        return self.states.get(number)

    def start(self, number, facts):
        if number is not None:
            self.states[number] = (facts.tags["fingerprint"], "RUNNING")
        self.write(number, "start", facts.title)

    def log(self, number, metrics, step, at):
        for name, value in metrics.items():
            self.write(number, name, value)

    def end(self, number, state, facts):
        if number is not None:
            self.states[number] = (self.states[number][0], state)
        self.write(number, "end", state)

    def attach(self, number, path):
        self.write(number, "file", path.name)


def events(folder, records, callback, ended="completed"):
    """Send a tracker the events of a search that trains these records."""
    meta = StudyMeta(name="demo")
    callback.on_study_start(StudyStarted(folder=folder, meta=meta, identity={"seed": 1}, records=records[:1]))
    known = {}
    for one in records[1:]:
        if one.state != "DUPLICATE":
            callback.on_trial_start(TrialStarted(record=record(one.number, "RUNNING", 0.0)))
            for entry in one.curve:
                callback.on_trial_eval(TrialMeasured(number=one.number, values=entry))
        known[one.number] = one
        callback.on_trial_end(TrialEnded(record=one, records=known, folder=folder))
    callback.on_study_end(StudyEnded(folder=folder, meta=meta, records=records, ended=ended))


def test_another_tracker_is_one_class_that_gets_every_event_in_order(tmp_path):
    (tmp_path / "report.html").write_text("")
    first, second = record(0, "COMPLETE", 2.0), record(1, "PRUNED", 3.0)
    same = record(2, "DUPLICATE", 2.0, curve=[], fingerprint=first.fingerprint)
    events(tmp_path, [first, second, same], StudyTracking(lambda event: CSVTracker(event.folder / "log.csv")))
    lines = csv.reader((tmp_path / "log.csv").read_text().splitlines())
    kept = [(n, name, value) for n, name, value in lines if name in ("start", "end", "valid_loss", "file")]
    assert kept == [
        ("", "start", "demo"),
        ("0", "start", "0000 Mx4"), ("0", "valid_loss", "3.0"), ("0", "valid_loss", "2.0"), ("0", "end", "COMPLETE"),
        ("1", "start", "0001 Mx4"), ("1", "valid_loss", "4.0"), ("1", "valid_loss", "3.0"), ("1", "end", "PRUNED"),
        ("2", "start", "0002 Mx4"), ("2", "end", "DUPLICATE"),
        ("", "file", "report.html"),
        ("", "end", "FINISHED"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What MLflow has of a study whose first trials were recorded afterwards, with a winner that was exported."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    for number, blocks in ((0, {"E": {"n_experts": 4}}), (1, {})):
        write_json(
            folder / "trials" / f"{number:04d}" / "arch.json", {"d_model": 16, "vocab_size": 256, "blocks": blocks}
        )
    write_json(folder / "study.json", {"data_fingerprint": "ab" * 32})
    model = hybridnas.build("MF", d_model=16, vocab_size=256)
    export(model, folder / "best", tokenizer=ByteTokenizer())
    curve = [{"tokens": 1000, "valid_loss": 3.0, "seconds": 2.0}, {"tokens": 2000, "valid_loss": 2.0, "seconds": 5.0}]
    first = record(0, "COMPLETE", 2.0, curve=curve, seconds=5.0, legs=[[1_700_000_100.0, 2000]], preset="moe_mamba")
    second = record(1, "COMPLETE", 2.5, seconds=3.0, legs=[[1_700_000_200.0, 2000]], choices={"split": 0.3}, lr=0.02)
    third = record(2, "COMPLETE", 1.5)
    words = {"space": "mamba_moe", "budget": "smoke", "data": "text: 3 files", "command": COMMAND}
    meta = StudyMeta(name="demo", lr=0.01, batch_size=4, seq_len=32, tokens=2000, active_params=500, **words)
    identity = {"seed": 3, "data": {"kind": "text", "path": "/home/me/novels"}, "budget": {"d_model": 16}}
    for _ in range(2):  # continuing repeats nothing
        callback = StudyTracking()
        start = StudyStarted(folder=folder, meta=meta, identity=identity, records=[first, second],
                             tracking_experiment="thesis")  # fmt: skip
        callback.on_study_start(start)
        callback.on_trial_start(TrialStarted(record=record(2, "RUNNING", 0.0)))
        for entry in third.curve:
            callback.on_trial_eval(TrialMeasured(number=2, values={**entry, "step": 3, "grad_norm": 0.5}))
        callback.on_trial_end(TrialEnded(record=third, records={0: first, 1: second, 2: third}, folder=folder))
        callback.on_study_end(StudyEnded(folder=folder, meta=meta, records=[first, second, third], ended="completed"))
    client = tracking.connect(default_uri(folder))
    experiment = client.get_experiment_by_name("thesis").experiment_id
    runs = tracking.search_runs(client, experiment, "")
    return folder, client, {run.data.tags.get("hybridnas.trial", "study"): run for run in runs}, len(runs)


def test_the_study_s_run_has_its_settings_and_how_the_best_came_down(searched):
    _, client, runs, count = searched
    assert count == 4
    study = runs["study"]
    expected = {"seed": "3", "data.kind": "text", "budget.d_model": "16", "active_params": "500"}
    assert study.data.params.items() >= expected.items()
    assert COMMAND in study.data.tags["mlflow.note.content"]
    assert study.data.tags["mlflow.source.name"] == COMMAND
    assert study.data.tags["hybridnas.best_trial"] == "2"
    for name, values in (("best_valid_loss", [2.0, 2.0, 1.5]), ("trial_valid_loss", [2.0, 2.5, 1.5])):
        points = client.get_metric_history(study.info.run_id, name)
        assert sorted((point.step, point.value) for point in points) == list(enumerate(values))


def test_a_trial_s_run_has_all_that_decides_it_its_data_and_its_real_times(searched):
    _, client, runs, _ = searched
    common = {"batch_size": "4", "seq_len": "32", "tokens_asked": "2000", "data": "text novels", "d_model": "16"}
    assert runs["0"].data.params.items() >= {**common, "lr": "0.01", "E.n_experts": "4", "choices.split": "0.5"}.items()
    assert runs["1"].data.params.items() >= {**common, "lr": "0.02", "choices.split": "0.3"}.items()
    assert runs["1"].data.params["data_fingerprint"] == "ab" * 32  # by which compare groups
    assert (runs["0"].info.start_time, runs["0"].info.end_time) == (1_700_000_095_000, 1_700_000_100_000)
    assert (runs["1"].info.start_time, runs["1"].info.end_time) == (1_700_000_197_000, 1_700_000_200_000)
    points = client.get_metric_history(runs["0"].info.run_id, "valid_loss")
    assert [(point.step, point.timestamp) for point in points] == [(1000, 1_700_000_097_000), (2000, 1_700_000_100_000)]
    for run in runs.values():
        [given] = run.inputs.dataset_inputs
        assert (given.dataset.name, given.dataset.digest) == ("text novels", "ab" * 16)
    assert runs["2"].data.metrics["grad_norm"] == 0.5
    assert "step" not in runs["2"].data.metrics
    if Path("/proc/meminfo").exists():
        assert 0 < runs["2"].data.metrics["system/system_memory_usage_percentage"] < 100


# MLflow warns of type hints of its own when its pyfunc is imported.
@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")
def test_the_winner_is_a_logged_model_that_continues_texts(searched):
    import mlflow

    folder, client, runs, _ = searched
    models = client.search_logged_models([runs["study"].info.experiment_id])
    [model] = list(models)
    assert (model.name, model.source_run_id, str(model.status)) == ("demo", runs["study"].info.run_id, "READY")
    files = list((folder / "mlartifacts").rglob("*"))
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    [place] = [path.parent for path in files if path.name == "MLmodel"]
    loaded = mlflow.pyfunc.load_model(str(place))
    asked = {"max_new_tokens": 5, "temperature": 0.0}
    texts = loaded.predict(["state ", ""], params=asked)
    assert [type(text) for text in texts] == [str, str]
    pieces = []
    stream_text(hybridnas.load(folder / "best"), ByteTokenizer(), "state ", pieces.append, max_new_tokens=5,
                temperature=0.0, top_k=None)  # fmt: skip
    assert texts[0] == "".join(pieces)


@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")
def test_the_model_of_a_task_maps_ids_to_logits(tmp_path):
    import mlflow
    import numpy as np
    import torch

    model = hybridnas.build("MF", d_model=16, vocab_size=32)
    tracking.write_model(tmp_path / "m", export(model, tmp_path / "best"))
    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    logits = mlflow.pyfunc.load_model(str(tmp_path / "m")).predict({"ids": ids})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model.eval()(torch.from_numpy(ids)).logits.numpy(), rtol=1e-5, atol=1e-6)


def test_a_search_that_fails_before_anything_is_recorded_leaves_the_runs_as_they_are(tmp_path):
    done = record(0, "COMPLETE", 2.0)
    events(tmp_path, [done], StudyTracking())
    before = snapshot(tmp_path)
    callback = StudyTracking()
    meta = StudyMeta(name="demo")
    callback.on_study_start(StudyStarted(folder=tmp_path, meta=meta, identity={"seed": 1}, records=[done]))
    callback.on_study_end(StudyEnded(folder=tmp_path, meta=meta, records=[done], ended="failed", last=False))
    assert snapshot(tmp_path) == before


def test_studies_that_share_a_database_are_compared_whatever_their_experiments_are_called(tmp_path):
    for name, experiment in (("a", "hybridnas"), ("b", "thesis")):
        folder = tmp_path / name
        folder.mkdir()
        with open_tracker("shared", folder, name, {}, experiment=experiment) as tracker:
            tracker.start_trial(0, {}, TAGS)
            tracker.end_trial(0, "COMPLETE", record(0, "COMPLETE", 2.0))
        assert not tracker.off
    assert {run.study for run in tracking.read_runs(default_uri(tmp_path))[0]} == {"a", "b"}


class Broken:
    """A tracker whose every call fails."""

    place = "nowhere"

    def __getattr__(self, name):
        raise RuntimeError(f"no {name} today")


def test_a_tracker_that_raises_costs_one_warning_and_no_trial(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hybridnas"):
        events(tmp_path, [record(0, "COMPLETE", 2.0), record(1, "FAIL", 2.0)], StudyTracking(lambda event: Broken()))
    assert [one.args[2] for one in caplog.records] == ["no open today"]


@pytest.mark.parametrize(
    ("ended", "status"), [("completed", "FINISHED"), ("interrupted", "KILLED"), ("failed", "FAILED")]
)
def test_the_study_s_own_run_ends_as_the_search_ended(tmp_path, ended, status):
    events(tmp_path, [record(0, "COMPLETE", 2.0)], StudyTracking(), ended)
    _, parents = runs_of(tmp_path, "tags.`hybridnas.kind` = 'study'")
    assert [run.info.status for run in parents] == [status]


def snapshot(folder):
    _, runs = runs_of(folder)
    return {run.info.run_id: (run.info.status, run.info.end_time, run.data.tags) for run in runs}


def test_a_tracker_that_is_opened_and_not_used_leaves_a_finished_run_as_it_is(tmp_path):
    for kind in ("study", "train"):
        with open_tracker(None, tmp_path, "demo", {}, kind=kind) as tracker:
            tracker.annotate({"params": 3}, {"pattern": "M"})
    before = snapshot(tmp_path)
    assert {status for status, _, _ in before.values()} == {"FINISHED"}
    for kind in ("study", "train"):
        tracker = open_tracker(None, tmp_path, "demo", {"other": 1}, kind=kind)
        assert tracker.ready()
        tracker.sync([])
        tracker.close("FAILED")  # the command was refused
    assert snapshot(tmp_path) == before


def test_a_measurement_that_comes_twice_is_recorded_once(tmp_path):
    for _ in range(2):
        with open_tracker(None, tmp_path, "demo", {}) as tracker:
            tracker.start_trial(0, {"params": 10}, TAGS)
            for tokens in (1000, 1000, 2000):
                tracker.log_eval(0, {"tokens": tokens, "valid_loss": 3.0 - tokens / 1000})
            tracker.end_trial(0, "COMPLETE")
    client, runs = by_trial(tmp_path)
    points = client.get_metric_history(runs["0"].info.run_id, "valid_loss")
    assert [(point.step, point.value) for point in points] == [(1000, 2.0), (2000, 1.0)]


def record_one(runs, number, shared):
    """Record one more trial of the study ``s1`` with one artifact; returns where."""
    folder = runs / "s1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arch.json").write_text("{}")
    uri = f"sqlite:///{runs}/mlflow.db" if shared else default_uri(folder)
    with open_tracker(uri, folder, "s1", {}) as tracker:
        assert tracker.ready(timeout=600)
        tracker.start_trial(number, {}, {"pattern": "M", "fingerprint": str(number)})
        tracker.end_trial(number, "COMPLETE", artifacts=[folder / "arch.json"])
    assert not tracker.off
    return uri


MOVES = [("moved", False), ("copied", False), ("moved", True)]


def record_before_moves(folder):
    for how, shared in MOVES:
        record_one(folder / f"{how}-{shared}" / "old", 0, shared)


@pytest.fixture(scope="module")
def recorded_elsewhere(tmp_path_factory):
    """Studies that a process of its own recorded: mlflow remembers where a run's artifacts lie."""
    folder = tmp_path_factory.mktemp("moves")
    first = multiprocessing.get_context("spawn").Process(target=record_before_moves, args=(folder,))
    first.start()
    first.join()
    assert first.exitcode == 0
    return folder


@pytest.mark.parametrize(("how", "shared"), MOVES)
def test_a_study_that_was_moved_keeps_its_artifacts_beside_itself(recorded_elsewhere, how, shared):
    old, new = (recorded_elsewhere / f"{how}-{shared}" / name for name in ("old", "new"))
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new)
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    uri = record_one(new, 1, shared)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before
    client = tracking.connect(uri)
    runs = tracking.search_runs(client, client.get_experiment_by_name("hybridnas").experiment_id, "")
    files = {run.data.tags["hybridnas.trial"]: [f.path for f in client.list_artifacts(run.info.run_id)]
             for run in runs if "hybridnas.trial" in run.data.tags}  # fmt: skip
    assert files == {"0": ["arch.json"], "1": ["arch.json"]}


def test_the_places_of_files_in_a_copied_study_are_set_right_without_mlflow(searched, tmp_path):
    old, new = searched[0], tmp_path / "copy"
    shutil.copytree(old, new)
    assert tracking.rehome(new)
    assert not tracking.rehome(new)
    assert not tracking.rehome(tmp_path)
    for folder in (old, new):
        home = tracking.artifact_home(default_uri(folder)).as_uri()
        with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as base:
            for table, column in tracking._PLACES:
                places = [place for (place,) in base.execute(f"SELECT {column} FROM {table} WHERE experiment_id > 0")]
                assert places, table
                assert all(place.startswith(home) for place in places), (table, places)


def test_tracking_leaves_the_process_as_it_was(tmp_path):
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "alembic", "sqlalchemy")]

    def state():
        levels = [(logger.level, logger.disabled, list(logger.filters)) for logger in loggers]
        return dict(os.environ), list(warnings.filters), levels

    before = state()
    with open_tracker(None, tmp_path, "demo", {}) as tracker:
        tracker.start_trial(0, {}, TAGS)
    with open_tracker("http://127.0.0.1:9", tmp_path, "demo", {}) as away:
        away.start_trial(0, {}, TAGS)
    assert (tracker.off, away.off) == (False, True)
    assert state() == before


TINY = {"batch_size": 2, "seq_len": 32, "valid_tokens": 64}


def test_a_refused_training_leaves_the_finished_one_as_it_is(tmp_path, corpus):
    data, folder = {"kind": "text", "path": str(corpus)}, tmp_path / "g"
    arch = hybridnas.Arch.from_pattern("MF", d_model=16, vocab_size=256)
    hybridnas.fit(arch, data=data, tokens=256, folder=folder, callbacks=[Tracking(tags={"preset": "mine"})], **TINY)
    before = snapshot(folder)
    [(status, end_time, tags)] = before.values()
    assert (status, tags["hybridnas.preset"], tags["hybridnas.pattern"]) == ("FINISHED", "mine", "MF")
    assert end_time is not None
    [run] = [run for run in runs_of(folder)[1] if run.info.status == "FINISHED"]
    assert run.data.metrics["test_loss"] == read_evals(folder)[-1].aux["test_loss"]
    with pytest.raises(CheckpointError), Tracking() as tracking:
        hybridnas.fit(arch, data=data, tokens=512, folder=folder, callbacks=[tracking], **TINY)
    assert snapshot(folder) == before


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_a_training_that_failed_or_was_stopped_says_so(tmp_path, corpus, error, status):
    class Raises(Callback):
        def on_step(self, run, step):
            raise error

    data, arch = {"kind": "text", "path": str(corpus)}, hybridnas.Arch.from_pattern("MF", d_model=16, vocab_size=256)
    with pytest.raises(error), Tracking() as tracking:
        hybridnas.fit(arch, data=data, tokens=256, folder=tmp_path, callbacks=[tracking, Raises()], **TINY)
    assert [kept[0] for kept in snapshot(tmp_path).values()] == [status]


def test_a_refused_command_leaves_a_finished_run_that_compare_still_finds(tmp_path, corpus, capsys):
    folder = tmp_path / "runs" / "g"
    command = ["train", "preset=moe_mamba", "preset.d_model=16", "preset.n_blocks=1", "preset.n_experts=2", "data=text",
               f"data.path={corpus}", "train.batch_size=2", "train.seq_len=32", "train.valid_tokens=64",
               f"out={folder}"]  # fmt: skip
    assert run_command([*command, "train.tokens=256"]) == 0
    before = snapshot(folder)
    assert [kept[0] for kept in before.values()] == ["FINISHED"]
    assert run_command([*command, "train.tokens=512"]) == 2
    assert snapshot(folder) == before
    capsys.readouterr()
    assert run_command(["compare", "study=g", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'compared'}"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert (lines[1][0], lines[1][-1]) == ("moe_mamba", "complete")
