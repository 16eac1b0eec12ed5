"""The mirror in MLflow: what it writes, that continuing repeats nothing, and that no server can cost a trial."""

import logging
import socket
from pathlib import Path

import pytest

from hybridnas.study.records import TrialRecord, write_record
from hybridnas.tracking import mlflow as tracking
from hybridnas.tracking.mlflow import Tracker, default_uri, flatten, numbers
from hybridnas.tracking.secrets import masked

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
    tracker = Tracker.open(None, folder, "demo", {"seed": 3, "storage": "postgresql://me:hunter2@db/optuna"})
    tracker.start_trial(0, {"params": 10, "choices": {"split": 0.5, "none": None}}, TAGS)
    tracker.log_eval(0, {"tokens": 1000, "valid_loss": 2.5, "aux": {"layer03.E.dropped": 0.25, "load": [0.1, 0.9]}})
    tracker.log_eval(0, {"tokens": 2000, "valid_loss": 2.0}, step=2000)
    arch = folder / "arch.json"
    arch.write_text("{}")
    tracker.end_trial(0, "COMPLETE", record(0, "COMPLETE", 2.0), [arch, folder / "absent"])
    tracker.start_trial(1, {}, {"pattern": "Mx4", "fingerprint": "1"})
    tracker.end_trial(1, "PRUNED", record(1, "PRUNED", 3.0, reason="pruned at 1,000 tokens"))
    tracker.start_trial(2, {"params": 7}, {"pattern": "Mx4", "fingerprint": "2"})
    tracker.log_eval(2, {"valid_loss": 2.9}, step=1000)
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
    assert runs["0"].data.params == {"params": "10", "choices.split": "0.5"}
    points = client.get_metric_history(runs["0"].info.run_id, "valid_loss")
    assert [(point.step, point.value) for point in points] == [(1000, 2.5), (2000, 2.0)]
    assert runs["0"].data.metrics["best_valid_loss"] == 2.0
    assert runs["0"].data.metrics["aux.layer03.E.dropped"] == 0.25
    assert runs["0"].data.metrics["aux.load.max"] == 0.9


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
    with Tracker.open(None, mirrored, "demo", {}) as tracker:
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
    with Tracker.open(default_uri(mirrored), folder, "one", {}, kind="train") as tracker:
        tracker.log_eval(None, {"valid_loss": 2.25}, step=10)
    _, runs = runs_of(mirrored, "tags.`hybridnas.kind` = 'train'")
    assert [(run.info.run_name, run.data.metrics["valid_loss"]) for run in runs] == [("one", 2.25)]


def test_an_unreachable_server_costs_one_warning_without_the_password(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with caplog.at_level(logging.WARNING, "hybridnas"):
            tracker = Tracker.open(f"http://me:hunter2@127.0.0.1:{taken.getsockname()[1]}", tmp_path, "s", {})
            assert not tracker.ready()
            for number in range(3):
                tracker.start_trial(number, {}, TAGS)
                tracker.log_eval(number, {"valid_loss": 1.0}, step=1)
                tracker.end_trial(number, "COMPLETE")
            tracker.close()
    assert tracker.off
    assert len(caplog.records) == 1
    assert "the server gave no answer (NewConnectionError); the search goes on" in caplog.text
    assert "http://***@127.0.0.1" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_database_that_is_no_database_costs_one_warning(tmp_path, caplog):
    (tmp_path / "mlflow.db").write_text("this is not sqlite, and long enough to be looked at" * 30)
    with caplog.at_level(logging.WARNING, "hybridnas"):
        tracker = Tracker.open(None, tmp_path, "s", {})
        tracker.start_trial(0, {}, TAGS)
        tracker.close()
    assert tracker.off
    assert len(caplog.records) == 1
    assert "file is not a database" in caplog.text


def test_off_starts_nothing(tmp_path):
    with Tracker.open("off", tmp_path, "s", {}) as tracker:
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


def test_values_are_flattened_for_params_and_metrics():
    assert flatten({"a": {"b": 1, "c": None}, "d:e": "x"}) == {"a.b": "1", "d_e": "x"}
    assert numbers({"a": {"b": 1}, "c": [1, 3], "d": "x", "e": True, "f": []}) == {
        "a.b": 1.0,
        "c.min": 1.0,
        "c.max": 3.0,
    }


def test_a_record_that_was_written_can_be_mirrored_whole(tmp_path):
    write_record(tmp_path, record(0, "COMPLETE", 2.0))
    assert tracking.record_params(record(0, "COMPLETE", 2.0, seed=5)) == {
        "pattern": "Mx4", "fingerprint": "0" * 64, "seed": "5", "params": "10", "active_params": "5",
        "choices.split": "0.5",
    }  # fmt: skip


def test_a_database_that_a_killed_process_began_is_begun_again(tmp_path):
    (tmp_path / ".mlflow.new.db").write_bytes(b"half of a database")
    tracking.make_database(tracking.default_uri(tmp_path))
    assert not (tmp_path / ".mlflow.new.db").exists()
    runs = tracking.connect(tracking.default_uri(tmp_path)).search_experiments()
    assert [experiment.name for experiment in runs] == ["Default"]
