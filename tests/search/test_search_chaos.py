"""Workers are killed at random; the study ends complete, and every trial's losses are those of a quiet run, to the bit.

HYBRIDNAS_CHAOS_KILLS=30 makes it the long test; the default suite kills 5 times. It prints its figures (pytest -s).
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridnas.search.replay import replay
from hybridnas.search.storage.folder_store import LEASES
from hybridnas.study.locks import FileLock, is_held
from hybridnas.study.records import load_records

KILLS = int(os.environ.get("HYBRIDNAS_CHAOS_KILLS", "5"))
TRIALS = 12 if KILLS >= 30 else 5
PATIENCE = 900  # seconds; a busy machine starts a worker in ten


def start(runs, settings, log):
    command = [sys.executable, "-m", "hybridnas.search", "budget=smoke", f"runs={runs}", "study=chaos", *settings]
    return subprocess.Popen(command, stdout=log, stderr=log)


def victims(folder: Path) -> list[tuple[int, Path]]:
    """Return the processes that work on a trial now, and the trial's measurements."""
    leases = [path for path in sorted((folder / LEASES).glob("trial-*")) if is_held(path)]
    found = [(FileLock(path).note().get("pid"), folder / "trials" / path.name[6:] / "metrics.jsonl") for path in leases]
    return [(pid, curve) for pid, curve in found if isinstance(pid, int)]


def after_some_work(victim: tuple[int, Path], measurements: int) -> None:
    """Wait until the victim has measured so many times more, or is done with its trial; busy machines take longer."""
    _, curve = victim
    begun = count(curve)
    for _ in range(3000):
        if count(curve) >= begun + measurements or victim not in victims(curve.parents[2]):
            return
        time.sleep(0.01)


def count(curve: Path) -> int:
    return curve.read_bytes().count(b"\n") if curve.exists() else 0


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.long
def test_a_study_survives_workers_and_parents_killed_at_random(tmp_path, tiny):
    chance = random.Random(7)
    log = (tmp_path / "log").open("ab")
    settings = [*tiny, "workers=2", "budget.tokens_per_active_param=2", "budget.evals=10", "data.max_bytes=20000"]
    trials, kills, parents = TRIALS, 0, 0
    folder = tmp_path / "chaos"
    begun = time.monotonic()
    process = start(tmp_path, [*settings, f"n_trials={trials}"], log)
    while kills < KILLS:
        assert time.monotonic() - begun < PATIENCE, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
            trials += 0 if process.returncode else 4  # it was done before it was killed often enough
            process = start(tmp_path, [*settings, f"n_trials={trials}"], log)
            continue
        working = victims(folder)
        if not working:
            continue
        victim = chance.choice(working)
        after_some_work(victim, chance.choice((0, 1, 1, 2, 3)))
        time.sleep(chance.uniform(0.0, 0.3))
        if kills % 10 == 3:  # the parent, too: its workers see it and leave
            process.kill()
            process.wait()
            kills, parents = kills + 1, parents + 1
        else:
            kills += kill(victim[0])
    if process.wait(PATIENCE) == -signal.SIGKILL:  # the last one killed was the parent
        process = start(tmp_path, [*settings, f"n_trials={trials}"], log)
    assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    log.close()
    seconds = time.monotonic() - begun

    printed = (tmp_path / "log").read_text()
    retries = printed.count("was interrupted; going on from its checkpoint")
    found, warnings = load_records(folder, running=True)
    assert warnings == []
    assert {record.state for record in found} <= {"COMPLETE", "PRUNED", "FAIL", "INFEASIBLE", "DUPLICATE"}
    assert [record.number for record in found] == list(range(len(found)))
    assert sum(record.state in ("COMPLETE", "PRUNED") for record in found) == trials
    assert not [record for record in found if record.state == "FAIL"]
    trained = [record for record in found if record.state in ("COMPLETE", "PRUNED")]
    for record in trained:
        again = replay(folder, record.number, out=tmp_path / f"again-{record.number}")
        assert again.pairs and again.identical, record
        curve = {entry["tokens"]: entry["valid_loss"] for entry in record.curve}
        assert record.rungs and all(curve[int(tokens)] == loss for tokens, loss in record.rungs)
    assert not list((folder / LEASES).glob("trial-*"))
    print(
        f"\nchaos: {kills} kills ({parents} of the parent), {len(found)} trials, {len(trained)} replayed "
        f"to the bit, {retries} retries from checkpoints, {seconds:.0f} s"
    )
