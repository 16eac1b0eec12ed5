"""A ladder in a real PostgreSQL: runs are claimed, taken over and exchanged; two hosts train one, and one dies."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from postgres import assert_no_password, postgres_server, wait_for

import hybridnas
from hybridnas.data import open_source
from hybridnas.data.source import source_config
from hybridnas.errors import StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.entrants import Base, Entrant, base_of
from hybridnas.ladders.plan import make_plan
from hybridnas.ladders.rows import ended, rows_of
from hybridnas.ladders.storage import SharedRuns, stored_base
from hybridnas.study.locks import FileLock
from hybridnas.train.records import Eval, append_eval, write_run

OWN = {"d_model": 16, "depth": 2, "multiple": 1, "seq_len": 32, "batch_size": 4, "valid_tokens": 256, "n_experts": 2}


@pytest.fixture(scope="module")
def server():
    yield from postgres_server()


@pytest.fixture
def settings(server, corpus, request):
    """Of a ladder of its own in the database."""
    return {
        **{"patterns": ["MF", "AF"], "sizes": [1, 2], "tokens": [0.5, 1], "warmup": 0.1, "seeds": 1, "device": "cpu"},
        **{"name": request.node.name, "storage": server.url, "heartbeat": 1},
        **{"budget": {"name": "tiny", **OWN}, "data": {"kind": "text", "path": str(corpus)}},
    }


@pytest.fixture
def hosts(settings, tmp_path):
    """Return a function that makes a host with a folder of its own: its plan and its side of the database."""
    with contextlib.ExitStack() as stack:

        def make(place, **changes):
            config = LadderConfig.from_dict({**settings, "runs": tmp_path / place, **changes})
            base = base_of(config)
            plan = make_plan(config, base, open_source(source_config(base.data)))
            shared = SharedRuns(config, note=said.append)
            stack.callback(shared.close)
            shared.agree({"lr": config.lr}, base)
            return list(plan.runs(dict.fromkeys(plan.archs, 1.0))), shared, plan

        said = make.said = []
        yield make


def ends(run, loss):
    """Write what a completed run leaves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    tokens = run.config.tokens
    value = Eval(tokens, 1, loss, loss, None, 0.5, 1.0, 1.0, {"annealed": 1.0, "b": float("nan"), "a": 1 / 3})
    append_eval(run.folder, value)
    write_run(run.folder, {"format": 1, "status": "completed", "final": True, "reason": ""})


def test_a_run_is_one_process_until_that_one_is_silent_for_three_heartbeats(hosts):
    (first, *_), one, _ = hosts("a")
    (same, *_), other, _ = hosts("b", heartbeat=5)  # for the first one, which expects one a second, often silent
    assert first.key == same.key
    assert one.claim(first)
    assert not other.claim(same)
    assert other.exchange([same]) == ({}, {first.key})
    time.sleep(4)  # heartbeats come
    assert not other.claim(same)
    one.release(first)
    assert other.claim(same)  # at once
    assert not one.claim(first)
    assert soon(lambda: one.claim(first))
    assert "which has been silent" in hosts.said[-1]
    assert soon(lambda: other.lost(same))
    assert not one.lost(first)


def soon(truth):
    for _ in range(600):
        if truth():
            return True
        time.sleep(0.1)
    return False


def test_what_has_ended_on_one_host_is_on_all_of_them(hosts):
    runs, one, plan = hosts("a")
    theirs, other, _ = hosts("b")
    for number, run in enumerate(runs[:2]):
        assert one.claim(run)
        ends(run, 2.0 + number)
        one.keep(run)
    (theirs[0].folder).mkdir(parents=True)
    (theirs[0].folder / "checkpoint").write_bytes(b"of an attempt that was overtaken")
    lock = FileLock(theirs[1].lock)
    assert lock.acquire(wait=False)  # another process of that host works in it, so its files stay as they are
    new, elsewhere = other.exchange(theirs)
    assert (set(new), elsewhere) == ({runs[0].key}, set())
    assert not ended(theirs[1])
    lock.release()
    assert set(other.exchange(theirs)[0]) == {runs[1].key}
    assert other.exchange(theirs) == ({}, set())
    for run, same in zip(runs[:2], theirs[:2], strict=True):
        assert rows_of(run, plan.target) == rows_of(same, plan.target)
        assert not other.claim(same)

    ends(theirs[2], 1.5)  # trained there before, without storage=
    assert other.exchange(theirs) == ({}, set())
    assert set(one.exchange(runs)[0]) == {runs[2].key}
    assert rows_of(runs[2], plan.target)[0].valid_loss == 1.5

    ends(runs[3], 1.0)
    ends(theirs[3], 3.0)
    one.exchange(runs)
    other.exchange(theirs)  # of two results of one run the first one counts, everywhere
    assert [rows_of(run, plan.target)[0].valid_loss for run in (runs[3], theirs[3])] == [1.0, 1.0]


def test_another_ladder_of_that_name_is_refused_with_the_difference(hosts):
    hosts("a", lr=0.01)
    with pytest.raises(StudyError) as caught:
        hosts("b", lr=0.02)
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("ladder.lr", 0.02, 0.01)


def test_a_host_without_the_study_takes_what_the_first_one_has_written(settings, tmp_path):
    config = LadderConfig.from_dict({**settings, "runs": tmp_path, "patterns": (), "budget": None, "data": None})
    config = config.replace(study="absent")
    with pytest.raises(StudyError) as caught:
        stored_base(config)
    assert (caught.value.field, caught.value.got) == ("ladder.study", "absent")
    arch = hybridnas.Arch.from_pattern("MF", d_model=16, vocab_size=256)
    plain = base_of(LadderConfig.from_dict(settings))
    base = Base(plain.budget, plain.data, (Entrant("MF", arch, None, 0.02), Entrant("mamba", arch, "mamba")))
    with contextlib.closing(SharedRuns(config, note=print)) as shared:
        shared.agree({}, base)
        assert stored_base(config) == dataclasses.replace(base, data=dict(base.data))
        grown = dataclasses.replace(base, found=base.found[:1])
        shared.agree({}, grown)  # the study has gone on
        assert stored_base(config).found == grown.found


def start(arguments, log, server):
    command = [sys.executable, "-m", "hybridnas.ladder", "storage=env", "heartbeat=1", *arguments]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HYBRIDNAS_STORAGE": server.url})


@pytest.mark.long
def test_two_hosts_train_one_ladder_and_one_of_them_dies(server, corpus, tmp_path):
    own = [f"budget.{key}={value}" for key, value in OWN.items()]
    arguments = ["patterns=[MF,AF]", "sizes=[1,2]", "tokens=[0.5,1]", "warmup=0.1", "seeds=1", "rates=[1,2]", "name=l"]
    arguments += ["device=cpu", "budget=smoke", *own, "data=text", f"data.path={corpus}"]
    folders = {place: tmp_path / place / "l" for place in "ab"}

    def begun(place):
        found = folders[place].glob("trainings/*/*/run.json")
        return [path for path in found if not json.loads(path.read_text())["final"]]

    with (tmp_path / "a.log").open("wb") as one, (tmp_path / "b.log").open("wb") as two:
        first = start([*arguments, f"runs={tmp_path}/a"], one, server)
        wait_for(lambda: begun("a"), first, one)
        first.send_signal(signal.SIGSTOP)  # a host that hangs: silent, not dead
        stopped = set(begun("a"))
        second = start([*arguments, f"runs={tmp_path}/b"], two, server)
        wait_for(lambda: b"which has been silent" in (tmp_path / "b.log").read_bytes(), second, two)
        first.send_signal(signal.SIGCONT)
        wait_for(lambda: set(begun("a")) - stopped or first.poll() == 0, first, one)  # it has left that run
        first.kill()
        first.wait()
        assert second.wait(900) == 0, (tmp_path / "b.log").read_text()
        third = start([*arguments, f"runs={tmp_path}/a", "workers=2"], one, server)  # finds all that it lacks
        assert third.wait(900) == 0, (tmp_path / "a.log").read_text()
    result = json.loads((folders["b"] / "ladder.json").read_text())["result"]
    assert (result["done"], result["failed"]) == (True, [])
    tables = [(folders[place] / "ladder.csv").read_bytes() for place in "ab"]
    assert tables[0] == tables[1]
    assert_no_password(tmp_path, "")

    alone = hybridnas.ladder(
        **{"patterns": ["MF", "AF"], "sizes": [1, 2], "tokens": [0.5, 1], "warmup": 0.1, "seeds": 1, "rates": [1, 2]},
        **{"name": "l", "device": "cpu", "budget": "smoke", **OWN, "runs": tmp_path / "c"},
        data={"kind": "text", "path": str(corpus)},
    )
    assert (alone.folder / "ladder.csv").read_bytes() == tables[0]
