"""A study in a real PostgreSQL: workers join by its name alone, one dies, the server dies, no password is written."""

import os
import signal
import subprocess
import sys
import time

import pytest
from postgres import assert_no_password, free_port, postgres_server, wait_for

import hybridnas
from hybridnas.arch.presets import DEFAULT_BASELINES as BASELINES
from hybridnas.cli import run as run_cli
from hybridnas.errors import ConfigError, StudyError
from hybridnas.search.replay import replay
from hybridnas.search.storage.database import BLOCK, Database, SqlStore, database_url, read_database
from hybridnas.search.storage.folder_store import LEASES
from hybridnas.study.locks import FileLock, is_held
from hybridnas.study.records import TrialRecord, load_records

SLOW = ["budget.tokens_per_active_param=2", "budget.evals=8"]


@pytest.fixture(scope="module")
def server():
    yield from postgres_server()


def start(settings, log, server):
    """Start a search with the database's URL in its environment."""
    command = [sys.executable, "-m", "hybridnas.search", "storage=env", "heartbeat=1", *settings]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HYBRIDNAS_STORAGE": server.url})


def working(folder):
    """Return the process that works on a trial with a measurement, or None."""
    for path in (folder / LEASES).glob("trial-*"):
        if is_held(path) and (folder / "trials" / path.name[6:] / "metrics.jsonl").exists():
            return FileLock(path).note().get("pid")
    return None


def states(server, name):
    _, finished, running = read_database(server.url, name, 5)
    return [record.state for record in finished] + ["RUNNING"] * len(running)


@pytest.fixture(scope="module")
def survived(server, tiny, tmp_path_factory):
    """A study begun by one process and joined by another from a folder of its own; the first one is killed."""
    folder = tmp_path_factory.mktemp("database")
    with (folder / "first.log").open("wb") as one, (folder / "second.log").open("wb") as two:
        settings = ["budget=smoke", "study=shared", f"runs={folder}/a", *tiny, *SLOW, "n_trials=7"]
        first = start(settings, one, server)
        wait_for(lambda: working(folder / "a/shared"), first, one)
        first.send_signal(signal.SIGSTOP)  # a host that hangs: silent, not dead
        second = start(["study=shared", "worker=true", f"runs={folder}/b"], two, server)
        wait_for(lambda: working(folder / "b/shared"), second, two)
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: b"was taken over by another worker" in (folder / "first.log").read_bytes(), first, one)
        wait_for(lambda: working(folder / "a/shared"), first, one)
        first.kill()
        first.wait()
        assert second.wait(900) == 0, (folder / "second.log").read_text()
    return folder


def test_one_of_two_workers_is_killed_and_the_other_ends_the_study(survived, server):
    printed = (survived / "second.log").read_text()
    assert "was interrupted; going on from its checkpoint" in printed
    assert "all trials are finished" in printed
    assert set(states(server, "shared")) <= {"COMPLETE", "PRUNED", "FAIL", "INFEASIBLE", "DUPLICATE"}
    found, warnings = load_records(survived / "b/shared")
    assert warnings == []
    assert sum(record.state in ("COMPLETE", "PRUNED") for record in found) == 7
    assert {record.preset for record in found[:5]} == set(BASELINES)
    assert (survived / "b/shared/report.html").is_file()
    assert (survived / "b/shared/best").is_dir() or "its weights" in printed


def test_a_trial_taken_over_has_the_scores_of_a_quiet_run(survived, tmp_path):
    printed = (survived / "second.log").read_text()
    number = int(printed.partition(" was interrupted")[0].rpartition(" ")[2])
    assert replay(survived / "b/shared", number, out=tmp_path / "again").identical


def test_status_reads_the_database_alone(survived, server, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HYBRIDNAS_STORAGE", server.url)
    assert run_cli(["search", "status", "study=shared", "storage=env", f"runs={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("study shared: 7 of 7 trials are finished (")
    assert "best so far: trial" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_worker_with_other_settings_is_refused_with_the_difference(survived, server, capsys, tmp_path):
    own = ["study=shared", f"storage={server.url}", f"runs={tmp_path}", "worker=true"]
    assert run_cli(["search", *own, "seed=3"]) == 2
    assert "study 'shared' has seed=0, this worker was given 3" in capsys.readouterr().err
    assert run_cli(["search", *own, "study=absent"]) == 2
    printed = capsys.readouterr().err
    assert (
        "has no study 'absent' (studies there: shared); start it with the same command without worker=true" in printed
    )
    assert_no_password(tmp_path, printed)


def test_no_password_is_in_any_file_or_word(survived, server, capsys, tmp_path, tiny):
    printed = (survived / "first.log").read_text() + (survived / "second.log").read_text()
    assert_no_password(survived, printed)
    settings = [sys.executable, "-m", "hybridnas.search", "budget=smoke", "study=masked", f"runs={tmp_path}", *tiny]
    settings = [*settings, "n_trials=1", f"storage={server.url}", "tracking=null"]
    done = subprocess.run(settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "masked/mlflow.db").is_file()
    assert "storage=postgresql+psycopg://***@127.0.0.1" in (tmp_path / "masked/study.json").read_text()
    assert_no_password(tmp_path, done.stdout + done.stderr)
    with pytest.raises(StudyError) as caught:  # its records lie in the database
        hybridnas.load_study(tmp_path / "masked").run()
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("storage", "folder", "database")


def test_a_database_that_refuses_or_is_not_there_is_one_sentence_without_the_password(server, tmp_path, capsys):
    for url in (server.url.replace("nas:", "nobody:"), server.url.replace(str(server.port), str(free_port()))):
        own = [f"storage={url}", f"runs={tmp_path}", "study=x"]
        assert run_cli(["search", "status", *own]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("StudyError: storage postgresql+psycopg://***@127.0.0.1")
        assert "cannot be opened: " in printed
        assert printed.count("\n") == 1
        assert_no_password(tmp_path, printed)


@pytest.mark.long
def test_a_database_killed_in_mid_search_costs_a_wait(server, tiny, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        settings = ["budget=smoke", "study=outage", f"runs={tmp_path}", *tiny, *SLOW, "n_trials=4", "workers=2"]
        process = start(settings, log, server)
        wait_for(lambda: working(tmp_path / "outage"), process, log)
        server.stop()
        time.sleep(2)
        server.start()
        assert process.wait(900) == 0, (tmp_path / "log").read_text()
    assert "RUNNING" not in states(server, "outage")
    found = load_records(tmp_path / "outage")[0]
    assert [record.state for record in found[:4]].count("FAIL") == 0
    assert_no_password(tmp_path, (tmp_path / "log").read_text())


def test_a_missing_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"needs the driver psycopg: pip install 'hybridnas\[postgres\]'"):
        Database("postgresql+psycopg://a:b@127.0.0.1:1/x")


@pytest.mark.parametrize("url", ["sqlite:///x.db", "mysql://a:pw1@h/x", "x"])
def test_other_databases_are_refused_without_their_password(url):
    with pytest.raises(ConfigError, match=r"must be postgresql\+psycopg://USER@HOST/DATABASE") as caught:
        database_url(url)
    assert "pw1" not in str(caught.value)


def test_the_environment_is_asked_only_with_storage_env(monkeypatch):
    monkeypatch.delenv("HYBRIDNAS_STORAGE", raising=False)
    assert database_url(None) is None
    with pytest.raises(ConfigError, match="storage=env needs the database's URL in the environment variable"):
        database_url("env")
    monkeypatch.setenv("HYBRIDNAS_STORAGE", "postgresql://u@h/d")
    assert database_url("env") == "postgresql+psycopg://u@h/d"
    assert database_url(None) is None


def test_a_look_reads_what_has_changed_and_no_other_record(server, tmp_path):
    one, two = (SqlStore(server.url, tmp_path / name / "looks", 600) for name in "ab")
    one.agree({"space": "s"}, "data", None)
    for number in range(2 * BLOCK + 3):
        one.save(TrialRecord(number=number, state="PRUNED", fingerprint=f"{number:064}"))
    assert [record.number for record in two.changes()] == list(range(2 * BLOCK + 3))
    assert two.changes() == []
    assert one.begin(TrialRecord(number=BLOCK, state="RUNNING")) and one.begin(TrialRecord(number=600, state="RUNNING"))
    assert [(record.number, record.state) for record in two.changes()] == [(BLOCK, "RUNNING"), (600, "RUNNING")]
    assert two.changes() == []
    assert (one.orphans(), two.orphans()) == ([], [])
    one.close()  # gives both back
    assert two.orphans() == [BLOCK, 600]
    assert two.begin(TrialRecord(number=600, state="RUNNING"))
    assert two.orphans() == [BLOCK]
    assert [record.number for record in load_records(tmp_path / "b/looks")[0]] == [
        number for number in range(2 * BLOCK + 3) if number != BLOCK
    ]
    two.close()


@pytest.mark.long
def test_ctrl_c_gives_the_trial_back_at_once(server, tiny, tmp_path):
    with (tmp_path / "log").open("wb") as log:
        settings = ["budget=smoke", "study=given", f"runs={tmp_path}", *tiny, *SLOW, "n_trials=2", "heartbeat=600"]
        process = start(settings, log, server)
        wait_for(lambda: working(tmp_path / "given"), process, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(900) == 0, (tmp_path / "log").read_text()
        again = start(settings, log, server)
        assert again.wait(900) == 0, (tmp_path / "log").read_text()
    assert "trial 0 was interrupted; going on from its checkpoint" in (tmp_path / "log").read_text()
    assert states(server, "given") == ["COMPLETE", "COMPLETE"]
