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

import pytest

from hybridnas.cli import run as run_cli
from hybridnas.errors import StudyError
from hybridnas.registry import BLOCKS, only_here
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.replay import _threads_of
from hybridnas.search.storage.folder_store import LEASES, FolderStore
from hybridnas.search.workers import supervisor as workers
from hybridnas.search.workers.supervisor import environment, threads_each
from hybridnas.study.folder import StudyFolder
from hybridnas.study.locks import FileLock, is_held
from hybridnas.study.records import TrialRecord, load_records

HOLD = """
import sys, time
from pathlib import Path
from hybridnas.study.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire(note={"trial": 3})
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_dies_with_its_process(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = FileLock(path)
        assert not lock.acquire(wait=False)
        assert is_held(path) and lock.note() == {"trial": 3}
        holder.kill()
    assert not is_held(path)
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


def running(number):
    return TrialRecord(number=number, state="RUNNING", pattern="M", fingerprint=f"{number:064}")


def test_only_a_trial_that_no_process_holds_is_an_orphan(tmp_path):
    one, two = FolderStore(tmp_path), FolderStore(tmp_path, worker=1)
    assert one.begin(running(0)) and one.begin(running(1))
    two.changes()
    assert not two.begin(running(0))
    assert [held.where.startswith("worker 0, process ") for held in two.running()] == [True, True]
    assert (one.orphans(), two.orphans()) == ([], [])
    one.close()
    assert two.orphans() == [0, 1]
    assert two.begin(running(0))
    assert two.orphans() == [1]
    two.close()


def test_numbers_go_on_after_the_highest_record_readable_or_not(tmp_path):
    store = FolderStore(tmp_path)
    assert store.next_number() == 0
    store.save(running(0))
    store.save(running(4))
    assert store.next_number() == 5
    (tmp_path / "trials/0007").mkdir()  # a process that died before it wrote anything
    assert store.next_number() == 5
    (tmp_path / "trials/0005").mkdir()
    (tmp_path / "trials/0005/result.json").write_text("{torn")
    assert store.next_number() == 6
    assert [record.number for record in store.changes()] == [0, 4]
    assert len(store.warnings) == 1
    assert store.changes() == []


def test_a_disk_that_refuses_a_record_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    store.save(running(0))
    with monkeypatch.context() as patched:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        patched.setattr(os, "fsync", full)
        with pytest.raises(StudyError, match="No space left"):
            store.save(TrialRecord(number=0, state="COMPLETE"))
    assert [record.state for record in FolderStore(tmp_path).changes()] == ["RUNNING"]
    assert [path.name for path in (tmp_path / "trials/0000").iterdir()] == ["result.json"]


def test_one_process_at_a_time_decides(tmp_path):
    one, two = FolderStore(tmp_path), FolderStore(tmp_path, worker=1)
    order = []

    def decide():
        with two.deciding():
            order.append("two")

    with one.deciding():
        waiting = threading.Thread(target=decide)
        waiting.start()
        time.sleep(0.1)
        order.append("one")
    waiting.join()
    assert order == ["one", "two"]


def test_the_processor_is_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [threads_each(n) for n in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads_each(n) for n in (1, 2, 8)] == [2, 2, 1]


def test_a_search_with_a_time_limit_takes_a_process_for_each_core_of_a_cpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    monkeypatch.setattr("hybridnas.search.config.only_here", list)

    def processes(minutes=None, devices=1, **fields):
        budget = Budget(d_model=8, depth=1, minutes=minutes, devices=devices)
        config = SearchConfig(space={}, data={}, budget=budget, **{"device": "cpu", **fields})
        return config.trainers, config.confirmers

    assert processes() == (1, 4)  # the course of such a search follows from its seed alone
    assert processes(minutes=0.6) == (1, 4)  # too short to start others
    assert processes(minutes=5.0) == (4, 4)
    assert processes(minutes=5.0, workers=2, confirm_workers=1) == (2, 1)
    assert processes(minutes=5.0, devices=2) == (1, 1)
    assert processes(minutes=5.0, worker="join") == (1, 1)


def test_what_only_this_process_has_registered_is_trained_in_this_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
    config = SearchConfig(space={}, data={}, budget=Budget(d_model=8, depth=1, minutes=5.0), device="cpu")
    before = only_here()
    BLOCKS.add("V", BLOCKS.get("F"), "__main__")
    try:
        assert [one for one in only_here() if one not in before] == ["block letter V (of __main__)"]
        assert (config.trainers, config.confirmers) == (1, 1)
    finally:
        BLOCKS.remove("V")
    assert only_here() == before


def test_a_workers_environment_says_its_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    config = SearchConfig(space={}, data={}, budget=Budget(d_model=8, depth=1), workers=3, device="cpu")
    found = environment(config, 1, 3)
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "2"


def test_a_worker_without_its_commands_token_is_not_let_in(tmp_path):
    holder = StudyFolder(tmp_path, "demo")
    holder.open({}, {})
    holder.admit_workers()
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
    found = set()
    for path in (folder / LEASES).glob("trial-*"):
        if is_held(path) and (folder / "trials" / path.name[6:] / "result.json").exists():
            found.add(FileLock(path).note().get("pid"))
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
    printed = capsys.readouterr().out
    assert printed.count("was interrupted; going on from its checkpoint") == 2
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
    monkeypatch.setattr(workers, "environment", lambda config, number, count: broken)
    assert run_cli(["search", "budget=smoke", f"runs={tmp_path}", "study=demo", *tiny, "n_trials=1", "workers=2"]) == 2
    assert re.search(
        r"StudyError: workers cannot start \(.*\); their log ends with: .* \(see ", capsys.readouterr().err
    )


@pytest.mark.long
def test_a_shared_folder_is_joined_without_a_parent_and_its_last_worker_reports(tmp_path, tiny):
    own = [*tiny, "budget.tokens_per_active_param=1", "n_trials=5", "worker=create"]
    both = [start(tmp_path, own), start(tmp_path, own)]
    printed = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert [record.state for record in load_records(tmp_path / "demo")[0]] == ["COMPLETE"] * 5
    assert sum("report: " in out for out, _ in printed) >= 1
    meta = json.loads((tmp_path / "demo/study.json").read_text())
    assert meta["identity"]["seed"] == 0
    joined = subprocess.run(
        [sys.executable, "-m", "hybridnas.search", "study=demo", f"runs={tmp_path}", "worker=true"],
        capture_output=True,
        text=True,
    )
    assert joined.returncode == 0, joined.stderr


@pytest.mark.parametrize(("words", "count"), [("3 threads", 3), ("1 thread", 1), ("1 threads", 1)])
def test_a_replay_computes_with_the_threads_of_the_worker(tmp_path, words, count):
    import torch

    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "machine": f"Linux x86_64, 8 cores, {words}, no GPU"}))
    before = torch.get_num_threads()
    with _threads_of(tmp_path):
        assert torch.get_num_threads() == count
    assert torch.get_num_threads() == before
    with _threads_of(tmp_path / "absent"):
        assert torch.get_num_threads() == before


def test_a_workers_last_message_is_read_once_though_its_pipe_ends_before_its_process():
    worker = workers.Worker(0, None, Path("log"))
    worker.messages.put(None)
    parent = object.__new__(workers.Supervisor)
    assert parent._read(worker, to_the_end=False) is False
    listening = threading.Thread(target=parent._read, args=(worker,), kwargs={"to_the_end": True}, daemon=True)
    listening.start()
    listening.join(10)
    assert not listening.is_alive()
