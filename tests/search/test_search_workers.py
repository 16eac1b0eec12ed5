"""Several workers: locks that die with their holder, a parent that watches, and nobody left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest

from hybridnas.cli import run as run_cli
from hybridnas.errors import StudyError
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.replay import _threads_of
from hybridnas.search.storage import leases
from hybridnas.search.storage.journal import open_journal
from hybridnas.search.storage.leases import LEASES, Crew, Earlier, FileLock, held
from hybridnas.search.workers import supervisor as workers
from hybridnas.search.workers.supervisor import environment, threads_each
from hybridnas.study.folder import StudyFolder
from hybridnas.study.records import TrialRecord, load_records, write_record

HOLD = """
import sys, time
from pathlib import Path
from hybridnas.search.storage.leases import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire(words={"trial": 3})
print("held", flush=True)
time.sleep(600)
"""
DIE_IN_MID_WRITE = """
import os, signal, sys
from pathlib import Path
from hybridnas.search.storage.journal import JournalLock
path = Path(sys.argv[1])
JournalLock(path).acquire()
with path.open("ab") as file:
    file.write(b'{"op_code":5,"worker_id":"x')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def study(tmp_path):
    """An empty Optuna study in a study folder."""
    (tmp_path / "trials").mkdir()
    return optuna.create_study(study_name="s", storage=open_journal(tmp_path / "journal.log"))


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = FileLock(path)
        assert not lock.acquire(wait=False)
        assert held(path) and lock.words() == {"trial": 3}
        holder.kill()
    assert not held(path)
    assert lock.acquire(wait=False)
    lock.release()
    assert not path.exists()


def test_a_lock_whose_file_was_taken_away_is_taken_on_the_new_file(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    first.path.unlink()
    assert second.acquire(wait=False)
    assert not FileLock(tmp_path / "lock").acquire(wait=False)
    first.release(keep=True)
    second.release()


def test_a_process_killed_while_it_writes_the_journal_blocks_and_breaks_nothing(tmp_path, study):
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    subprocess.run([sys.executable, "-c", DIE_IN_MID_WRITE, str(journal)])
    assert journal.read_bytes() != whole
    begun = time.monotonic()
    study.ask()
    assert time.monotonic() - begun < 15  # Optuna's own lock would wait 30 s before it is broken
    assert journal.read_bytes().startswith(whole)
    again = optuna.load_study(study_name="s", storage=open_journal(journal))
    assert [trial.state.name for trial in again.trials] == ["RUNNING"]


def test_a_write_that_the_disk_refuses_leaves_the_journal_whole(tmp_path, study, monkeypatch):
    journal = tmp_path / "journal.log"
    trial = study.ask()
    with monkeypatch.context() as patched:

        def full(descriptor):
            os.truncate(journal, journal.stat().st_size - 7)  # half of what was asked for
            raise OSError(28, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            trial.set_user_attr("a", 1)
    trial = optuna.load_study(study_name="s", storage=open_journal(journal)).trials[0]
    assert trial.user_attrs == {}
    study.set_user_attr("b", 2)
    assert optuna.load_study(study_name="s", storage=open_journal(journal)).user_attrs == {"b": 2}


def test_only_a_trial_that_nobody_holds_is_adopted(tmp_path, study):
    one, two = Crew(tmp_path), Crew(tmp_path, worker=1)
    numbers = [study.ask().number for _ in range(3)]
    assert one.take(study, 0) and not two.take(study, 0)
    assert two.running(study) == numbers
    assert two.adopt(study, paused={1}).number == 2
    assert two.adopt(study, paused={1}) is None
    assert two.running(study) == [0, 1]
    one.close()
    assert two.adopt(study, paused={1}).number == 0
    two.close()


def test_a_trial_that_kills_its_process_again_and_again_fails_with_the_reason(tmp_path, study):
    study.enqueue_trial({}, user_attrs={"baseline": "mamba"})
    trial = study.ask()
    for _ in range(leases.DEATHS - 1):
        crew = Crew(tmp_path)
        assert crew.adopt(study).number == trial.number
        assert load_records(tmp_path)[0] == []
        crew.close()
    crew = Crew(tmp_path)
    crew.adopt(study)
    (record,) = load_records(tmp_path)[0]
    assert (record.state, record.preset) == ("FAIL", "mamba")
    assert "its process died 5 times in a row at the same place" in record.reason
    crew.close()


def test_a_trial_that_comes_further_each_time_may_be_interrupted_for_ever(tmp_path, study):
    study.ask()
    (tmp_path / "trials/0000").mkdir()
    for turn in range(3 * leases.DEATHS):
        (tmp_path / "trials/0000/metrics.jsonl").write_text("x" * turn)
        crew = Crew(tmp_path)
        assert crew.adopt(study) is not None
        crew.close()
    assert load_records(tmp_path)[0] == []


def test_two_workers_that_draw_one_architecture_at_the_same_moment(tmp_path, study):
    one, two = Crew(tmp_path), Crew(tmp_path, worker=1)
    first, second = study.ask(), study.ask()
    records = {}
    assert Earlier(one, study, first, records).get("f" * 64) is None
    other = Earlier(two, study, second, records).get("f" * 64)
    assert (other.number, other.state) == (first.number, "RUNNING")
    record = TrialRecord(number=first.number, state="COMPLETE", fingerprint="f" * 64, valid_loss=1.0)
    write_record(tmp_path / "trials/0000", record)
    one.done(first.number)
    found = Earlier(two, study, second, records).get("f" * 64)
    assert (found.number, found.valid_loss) == (first.number, 1.0)
    two.close()


def test_the_processor_is_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [threads_each(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads_each(n) for n in (1, 2, 8)] == [2, 2, 1]


def test_a_workers_environment_says_its_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = SearchConfig(space={}, data={}, budget=Budget(d_model=8, depth=1), workers=3, device="cpu")
    assert environment(config, 1)["OMP_NUM_THREADS"] == environment(config, 1)["MKL_NUM_THREADS"] == "2"


def test_a_worker_without_its_commands_token_is_not_let_in(tmp_path):
    holder = StudyFolder(tmp_path, "demo")
    holder.open({}, {})
    assert StudyFolder(tmp_path, "demo").join(holder.token)["study"] == "demo"
    for token in ("", "guess"):
        with pytest.raises(StudyError, match="no longer held by the command that started this worker"):
            StudyFolder(tmp_path, "demo").join(token)
    holder.close()


def test_shared_workers_let_each_other_in_and_nobody_else(tmp_path):
    one, two = StudyFolder(tmp_path, "demo"), StudyFolder(tmp_path, "demo")
    one.open({}, {}, shared=True)
    two.open({}, {}, shared=True)
    with pytest.raises(StudyError, match="is being written by another process"):
        StudyFolder(tmp_path, "demo").open({}, {})
    assert not one.alone()
    assert two.alone()
    with pytest.raises(StudyError, match="is being written by another process"):
        StudyFolder(tmp_path, "demo").open({}, {}, shared=True)
    two.close()


def start(runs, settings):
    command = [sys.executable, "-m", "hybridnas.search", "budget=smoke", f"runs={runs}", "study=demo", *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pids(folder):
    """Return the processes that hold a trial now."""
    found = (FileLock(path).words().get("pid") for path in (folder / LEASES).glob("trial-*") if held(path))
    return {pid for pid in found if pid}


def wait_for(truth, process):
    for _ in range(12_000):
        if truth():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


def alive(pid):
    try:
        return "Z" not in re.search(r"State:\s+(\w)", Path(f"/proc/{pid}/status").read_text())[1]
    except OSError:
        return False


@pytest.fixture(scope="module")
def orphaned(tmp_path_factory, tiny):
    """A study whose command was killed while two workers trained; what was refused meanwhile, and who was left."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [*tiny, "budget.tokens_per_active_param=6", "budget.evals=12", "n_trials=4", "workers=2"]
    process = start(runs, settings)
    wait_for(lambda: len(pids(runs / "demo")) == 2, process)
    left = pids(runs / "demo")
    for pid in left:
        os.kill(pid, signal.SIGSTOP)  # so that they are at work still, however slow the next two commands are
    refused = subprocess.run([*process.args], capture_output=True, text=True)
    status = subprocess.run([*process.args[:3], "status", *process.args[4:6]], capture_output=True, text=True)
    process.kill()
    for pid in left:
        os.kill(pid, signal.SIGCONT)
    process.communicate()
    return runs, settings, refused, status, left


def test_a_second_search_in_the_same_folder_is_refused_while_workers_run(orphaned):
    refused = orphaned[2]
    assert refused.returncode == 2
    assert refused.stderr.startswith("StudyError: study 'demo' is being written by another process; wait for it")


def test_status_says_who_trains_what_while_it_runs(orphaned):
    status = orphaned[3]
    assert status.returncode == 0, status.stderr
    assert re.match(r"study demo: \d of 4 trials are finished \(", status.stdout)
    assert "2 running" in status.stdout
    assert len(re.findall(r"^trial +\d+  \S+.*  worker \d, process \d+ on ", status.stdout, re.MULTILINE)) == 2


def test_workers_of_a_killed_command_end_and_the_same_command_goes_on(orphaned, capsys):
    runs, settings, _, _, left = orphaned
    assert len(left) == 2
    for _ in range(6000):
        if not any(map(alive, left)):
            break
        time.sleep(0.05)
    assert not any(map(alive, left))
    begun = {p.parent.name for p in (runs / "demo/trials").glob("*/checkpoint.safetensors")}
    assert run_cli(["search", "budget=smoke", f"runs={runs}", "study=demo", *settings]) == 0
    said = capsys.readouterr().out
    assert said.count("was interrupted; going on from its checkpoint") == 2
    assert len(begun) == 2
    found = load_records(runs / "demo")[0]
    assert [record.state for record in found] == ["COMPLETE"] * 4
    assert not list((runs / "demo" / LEASES).glob("trial-*"))


def test_ctrl_c_reaches_every_worker_once_and_the_report_is_written(tmp_path, tiny):
    process = start(tmp_path, [*tiny, "budget.tokens_per_active_param=6", "n_trials=4", "workers=2"])
    wait_for(lambda: len(pids(tmp_path / "demo")) == 2, process)
    left = pids(tmp_path / "demo")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert out.count("stopping: each worker finishes its step and saves") == 1
    assert "stopped early; the same command goes on from here" in out
    assert (tmp_path / "demo/report.html").is_file()
    assert not any(map(alive, left))
    logs = "".join(path.read_text() for path in (tmp_path / "demo" / LEASES).glob("worker-*.log"))
    assert "Traceback" not in logs
    assert logs.count("finishing this step and saving") <= 2


def test_a_second_ctrl_c_ends_everything_at_once(tmp_path, tiny):
    process = start(tmp_path, [*tiny, "budget.tokens_per_active_param=6", "n_trials=4", "workers=2"])
    wait_for(lambda: len(pids(tmp_path / "demo")) == 2, process)
    left = pids(tmp_path / "demo")
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=900)
    assert not any(map(alive, left))
    states = {r.state for r in load_records(tmp_path / "demo")[0]}
    assert states <= {"COMPLETE", "PRUNED"}


def test_what_one_worker_cannot_do_ends_the_search_in_its_words(tmp_path, tiny, capsys):
    settings = [*tiny, "budget.lr=1e9", "n_trials=6", "workers=2"]
    assert run_cli(["search", "budget=smoke", f"runs={tmp_path}", "study=demo", *settings]) == 2
    assert "trials all failed, the last one because: " in capsys.readouterr().err


def test_workers_that_cannot_start_are_not_started_for_ever(tmp_path, tiny, capsys, monkeypatch):
    broken = {**os.environ, "PYTHONPATH": "/absent", "PYTHONHOME": "/absent"}
    monkeypatch.setattr(workers, "environment", lambda config, number: broken)
    assert run_cli(["search", "budget=smoke", f"runs={tmp_path}", "study=demo", *tiny, "n_trials=1", "workers=2"]) == 2
    assert re.search(r"StudyError: workers cannot start \(.*\); the last one said: .* \(see ", capsys.readouterr().err)


def test_a_shared_folder_is_joined_without_a_parent_and_its_last_worker_reports(tmp_path, tiny):
    own = [*tiny, "budget.tokens_per_active_param=1", "n_trials=5", "worker=create"]
    both = [start(tmp_path, own), start(tmp_path, own)]
    said = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [record.state for record in load_records(tmp_path / "demo")[0]] == ["COMPLETE"] * 5
    assert sum("report: " in out for out, _ in said) >= 1
    meta = json.loads((tmp_path / "demo/study.json").read_text())
    assert meta["identity"]["seed"] == 0
    joined = subprocess.run(
        [sys.executable, "-m", "hybridnas.search", "study=demo", f"runs={tmp_path}", "worker=true"],
        capture_output=True,
        text=True,
    )
    assert joined.returncode == 0, joined.stderr


def test_a_replay_computes_with_the_threads_of_the_worker(tmp_path):
    import torch

    (tmp_path / "run.json").write_text('{"format": 1, "machine": "Linux x86_64, 8 cores, 3 threads, no GPU"}')
    before = torch.get_num_threads()
    with _threads_of(tmp_path):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with _threads_of(tmp_path / "absent"):
        assert torch.get_num_threads() == before


def test_a_workers_last_word_is_heard_once_though_its_pipe_ends_before_its_process():
    worker = workers.Worker(0, None, Path("log"))
    worker.words.put(None)
    parent = object.__new__(workers.Supervisor)
    assert parent._hear(worker, to_the_end=False) is False
    listening = threading.Thread(target=parent._hear, args=(worker,), kwargs={"to_the_end": True}, daemon=True)
    listening.start()
    listening.join(10)
    assert not listening.is_alive()
