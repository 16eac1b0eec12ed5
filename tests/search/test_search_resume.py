"""A search that is stopped, killed or damaged goes on: no finished trial is lost, and none is trained again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from hybridnas.cli import run as run_cli
from hybridnas.errors import StudyError
from hybridnas.study.folder import StudyFolder, first_difference, read_study
from hybridnas.study.records import TrialRecord, load_records, trial_folder, write_record
from hybridnas.train import checkpoint

SLOW = "budget.tokens_per_active_param=6"  # seconds a trial: long enough to be killed in


def search(capsys, runs, settings, code=0):
    """Run the command in this process; returns what it printed, standard error where it failed."""
    assert run_cli(["search", "budget=smoke", f"runs={runs}", "study=demo", *settings]) == code
    out, err = capsys.readouterr()
    return err if code else out


def start(runs, settings):
    command = [
        sys.executable,
        "-m",
        "hybridnas.search",
        "budget=smoke",
        f"runs={runs}",
        "study=demo",
        *settings,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, path, lines):
    """Wait until ``path`` has so many lines."""
    for _ in range(1200):
        if path.is_file() and path.read_bytes().count(b"\n") >= lines:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"{path} did not appear: {process.communicate()}")


def snapshot(folder):
    """Return name -> (bytes, time of writing) of what the finished trials left."""
    files = [path for trial in (folder / "trials").iterdir() for path in trial.iterdir()]
    kept = [path for path in files if path.name in ("result.json", "metrics.jsonl", "arch.json", "run.json")]
    done = {trial_folder(folder, record.number) for record in load_records(folder)[0]}
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept if path.parent in done}


def losses(folder):
    """Return number -> every measured loss, of the records."""
    found, warnings = load_records(folder)
    assert warnings == []
    return {record.number: record.points() for record in found}


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny):
    """A study whose process was killed in the middle of trial 1, and what was finished then."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [*tiny, SLOW, "budget.evals=12", "n_trials=3"]
    process = start(runs, settings)
    wait_for(process, runs / "demo/trials/0001/metrics.jsonl", 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return runs, settings


def test_kill_9_in_a_trial_then_the_same_command(killed, capsys, tmp_path):
    runs, settings = killed
    folder = runs / "demo"
    before = snapshot(folder)
    half = (folder / "trials/0001/metrics.jsonl").read_bytes()
    assert {path.parent.name for path in before} == {"0000"}
    assert checkpoint.load(folder / "trials/0001").header["progress"]["step"] > 0

    printed = search(capsys, runs, settings)
    assert "trial 1 was interrupted; going on from its checkpoint" in printed
    assert "resuming: 1 of 3 trials finished" in printed
    assert {path: snapshot(folder)[path] for path in before} == before
    assert (folder / "trials/0001/metrics.jsonl").read_bytes().startswith(half[: half.rfind(b"\n")])
    assert sorted(losses(folder)) == [0, 1, 2]
    states = [record.state for record in load_records(folder)[0]]
    assert states == ["COMPLETE"] * 3

    search(capsys, tmp_path, settings)  # undisturbed, for comparison
    assert losses(folder) == losses(tmp_path / "demo")


def test_the_same_command_with_more_trials_touches_no_finished_one(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "n_trials=2"])
    before = snapshot(tmp_path / "demo")
    printed = search(capsys, tmp_path, [*tiny, "n_trials=7"])
    after = snapshot(tmp_path / "demo")
    assert {path: after[path] for path in before} == before
    found = load_records(tmp_path / "demo")[0]
    assert [record.number for record in found] == list(range(len(found)))
    assert sum(record.state in ("COMPLETE", "PRUNED") for record in found) == 7
    assert "resuming: 2 of 7 trials finished" in printed
    again = search(capsys, tmp_path, [*tiny, "n_trials=7"])
    assert snapshot(tmp_path / "demo") == after
    assert "all trials are finished" in again


def test_draws_after_resuming_are_new_ones(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "space.baselines=[]", "n_trials=2", "sampler=random"])
    search(capsys, tmp_path, [*tiny, "space.baselines=[]", "n_trials=4", "sampler=random"])
    found = load_records(tmp_path / "demo")[0]
    drawn = [json.dumps(dict(record.choices), sort_keys=True) for record in found]
    assert drawn[:2] != drawn[2:4]


def test_ctrl_c_ends_with_the_report_so_far(tmp_path, tiny):
    process = start(tmp_path, [*tiny, SLOW, "n_trials=3"])
    wait_for(process, tmp_path / "demo/trials/0001/metrics.jsonl", 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "\x1b" not in out  # piped: no colours
    assert "stopped early; the same command goes on from here" in out
    assert (tmp_path / "demo/report.html").is_file()
    assert (tmp_path / "demo/best/model.safetensors").is_file()
    assert sorted(losses(tmp_path / "demo")) == [0]


def test_a_process_that_died_before_it_wrote_the_end_trains_nothing_twice(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "n_trials=2"])
    forget_the_end(tmp_path / "demo")
    before = snapshot(tmp_path / "demo")
    curve = (tmp_path / "demo/trials/0001/metrics.jsonl").read_bytes()
    printed = search(capsys, tmp_path, [*tiny, "n_trials=3"])
    assert "trial 1 was interrupted" in printed
    after = snapshot(tmp_path / "demo")
    untouched = [path for path in before if path.parent.name == "0000" or path.name == "metrics.jsonl"]
    assert {path: after[path] for path in untouched} == {path: before[path] for path in untouched}
    assert (tmp_path / "demo/trials/0001/metrics.jsonl").read_bytes() == curve
    assert [record.state for record in load_records(tmp_path / "demo")[0]] == ["COMPLETE"] * 3


def test_two_searches_in_one_folder_at_once_are_refused(tmp_path, tiny, capsys):
    holder = StudyFolder(tmp_path, "demo")
    search(capsys, tmp_path, [*tiny, "n_trials=1"])
    meta = read_study(tmp_path / "demo")
    holder.open(meta["identity"], {})
    try:
        printed = search(capsys, tmp_path, [*tiny, "n_trials=2"], code=2)
    finally:
        holder.close()
    assert printed == (
        "StudyError: study 'demo' is being written by another process; wait for it, or choose study=NEWNAME\n"
    )
    search(capsys, tmp_path, [*tiny, "n_trials=2"])


def test_the_journal_for_the_dashboard_is_made_from_the_records_and_can_be_lost(tmp_path, tiny, capsys):
    import optuna

    search(capsys, tmp_path, [*tiny, "n_trials=6"])
    journal = tmp_path / "demo/journal.log"
    whole = journal.read_bytes()
    for damage in (b"", b"{garbage", None):
        journal.unlink() if damage is None else journal.write_bytes(damage)
        search(capsys, tmp_path, [*tiny, "n_trials=6"])
        backend = optuna.storages.journal.JournalFileBackend(str(journal))
        study = optuna.load_study(study_name="demo", storage=optuna.storages.JournalStorage(backend))
        found = load_records(tmp_path / "demo")[0]
        assert [trial.number for trial in study.trials] == [record.number for record in found]
        for trial, record in zip(study.trials, found, strict=True):
            assert trial.state.name == ("COMPLETE" if record.state == "COMPLETE" else "PRUNED")
            assert trial.user_attrs.get("preset") == record.preset
            assert trial.value == (record.valid_loss if record.state == "COMPLETE" else trial.value)
            assert all(trial.intermediate_values[int(tokens)] == loss for tokens, loss in record.rungs)
            assert (trial.user_attrs["name"], trial.user_attrs["state"]) == (record.name, record.state)
            assert trial.datetime_complete.timestamp() == pytest.approx(record.legs[-1][0])
            assert trial.duration.total_seconds() == pytest.approx(record.seconds, abs=1e-5)
        assert study.metric_names == ["val_loss"]
        drawn = optuna.load_study(study_name="demo: choices", storage=optuna.storages.JournalStorage(backend)).trials
        for trial, record in zip(drawn, found, strict=True):  # those without choices are in nobody's way
            assert trial.state.name == "FAIL" if record.preset else bool(trial.params)
        assert {"space": "mamba_moe", "budget": "smoke"}.items() <= study.user_attrs.items()
    assert len(whole) > 0
    assert not [path for path in (tmp_path / "demo").iterdir() if path.name.startswith((".journal", "journal.log."))]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["space=hybrid"], "space.name is 'mamba_moe' there and 'hybrid' here"),
        (["space.n_experts=[2]"], r"space.n_experts is [1, 2, 4, 8, 16, 32] there and [2] here"),
        (["seed=1"], "seed is 0 there and 1 here"),
        (["budget.lr=0.1"], "budget.lr is 0.003 there and 0.1 here"),
        (["sampler=random"], "sampler is 'evolution' there and 'random' here"),
        (["data.valid_fraction=0.2"], "data.valid_fraction is 0.05 there and 0.2 here"),
    ],
)
def test_a_study_of_something_else_is_refused_with_the_difference(killed, capsys, settings, words):
    runs, own = killed
    printed = search(capsys, runs, [*own, *settings], code=2)
    assert words in printed
    assert "choose study=NEWNAME, or the same settings to go on" in printed
    assert printed.count("\n") == 1


def test_limits_words_and_folders_may_change_when_a_study_goes_on(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "n_trials=1"])
    search(capsys, tmp_path, [*tiny, "n_trials=1", "minutes=3", "space.description=other", "budget.name=mine"])


def test_a_first_call_that_went_wrong_can_be_corrected(tmp_path, tiny, capsys):
    assert "matches no file" in search(capsys, tmp_path, [*tiny, "data.path=/absent.txt"], code=2)
    search(capsys, tmp_path, [*tiny, "n_trials=1"])
    assert sorted(losses(tmp_path / "demo")) == [0]


def test_other_data_under_the_same_path_is_refused(tmp_path, tiny, capsys):
    text = tmp_path / "words.txt"
    text.write_text("".join(f"state space expert mamba token router layer {n}\n" for n in range(400)))
    search(capsys, tmp_path, [*tiny, f"data.path={text}", "n_trials=1"])
    text.write_text("".join(f"another text altogether, of other words {n}\n" for n in range(400)))
    kept = {name: (tmp_path / "demo" / name).read_bytes() for name in ("study.json", ".lock")}
    printed = search(capsys, tmp_path, [*tiny, f"data.path={text}", "n_trials=2"], code=2)
    assert "was begun with another data fingerprint" in printed
    assert {name: (tmp_path / "demo" / name).read_bytes() for name in kept} == kept


def test_a_corrupted_checkpoint_of_an_interrupted_trial_is_named(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "n_trials=2"])
    folder = tmp_path / "demo"
    forget_the_end(folder)
    (folder / "trials/0001/checkpoint.safetensors").write_bytes(b"garbage")
    before = snapshot(folder)
    printed = search(capsys, tmp_path, [*tiny, "n_trials=2"], code=2)
    assert printed.startswith(f"CheckpointError: {folder}/trials/0001/checkpoint.safetensors")
    assert "delete" in printed
    assert printed.count("\n") == 1
    assert snapshot(folder) == before


def forget_the_end(folder):
    """Put the last trial's record back to how it was while it trained, as if the process had died before its end."""
    path = sorted((folder / "trials").glob("*/result.json"))[-1]
    record = TrialRecord.from_dict(json.loads(path.read_text()))
    begun = {name: getattr(record, name) for name in ("pattern", "fingerprint", "preset", "choices", "cost", "seed")}
    write_record(path.parent, TrialRecord(number=record.number, state="RUNNING", **begun))


def test_a_trial_whose_record_is_damaged_runs_again_to_the_same_numbers(tmp_path, tiny, capsys):
    search(capsys, tmp_path, [*tiny, "n_trials=2"])
    before = losses(tmp_path / "demo")
    (tmp_path / "demo/trials/0001/result.json").write_text('{"number": 1, "sta')
    printed = search(capsys, tmp_path, [*tiny, "n_trials=6"])
    assert "warning: skipped a trial" in printed
    found = load_records(tmp_path / "demo")[0]
    again = next(record for record in found if record.preset == "mamba")
    assert again.points() == before[1]
    assert sorted(record.preset or "" for record in found).count("mamba") == 1
    search(capsys, tmp_path, [*tiny, "n_trials=6"])
    assert [record.number for record in load_records(tmp_path / "demo")[0]] == [record.number for record in found]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 99, "identity": {}, "study": "demo"}', "has format 99, this version reads 1 and 2"),
    ],
)
def test_a_study_json_that_is_not_ours_is_named(tmp_path, text, words):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/study.json").write_text(text)
    with pytest.raises(StudyError, match=words):
        StudyFolder(tmp_path, "demo").open({}, {})


def test_a_study_of_the_former_data_is_refused_in_words_and_left_as_it_is(tmp_path):
    former, now = {"data": {"kind": "stdlib"}}, {"data": {"kind": "stdlib", "test_fraction": 0.05}}
    first = StudyFolder(tmp_path, "demo")
    first.open(former, {})
    first.close()
    first.trial(0).mkdir()
    before = (first.path / "study.json").read_bytes()
    with pytest.raises(StudyError, match=r"no test part .* are read as they are, but no search goes on") as found:
        StudyFolder(tmp_path, "demo").open(now, {})
    assert (found.value.field, found.value.got, found.value.allowed) == ("data.test_fraction", 0.05, None)
    assert (first.path / "study.json").read_bytes() == before


def test_a_refused_folder_is_not_kept_locked(tmp_path):
    first = StudyFolder(tmp_path, "demo")
    first.open({"seed": 0}, {})
    (first.trial(0)).mkdir()
    first.close()
    refused = StudyFolder(tmp_path, "demo")
    with pytest.raises(StudyError, match="seed is 0 there and 1 here"):
        refused.open({"seed": 1}, {})
    again = StudyFolder(tmp_path, "demo")
    again.open({"seed": 0}, {})
    again.close()


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b"])
def test_a_study_is_called_by_a_plain_name(tmp_path, name):
    with pytest.raises(StudyError, match="must be a plain folder name"):
        StudyFolder(tmp_path, name)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(StudyError, match="cannot be made"):
        StudyFolder(tmp_path / "runs", "demo").open({}, {})


def test_trials_without_their_study_are_refused(tmp_path):
    (tmp_path / "demo/trials/0000").mkdir(parents=True)
    with pytest.raises(StudyError, match=r"has trials but no study.json") as caught:
        StudyFolder(tmp_path, "demo").open({}, {})
    assert caught.value.field == "study"


def test_differences_name_the_deepest_key_that_differs():
    assert not first_difference({"a": {"b": 1}}, {"a": {"b": 1}})
    assert str(first_difference({"a": {"b": 1}}, {"a": {"b": 2}})) == "a.b is 1 there and 2 here"
    found = first_difference({"a": 1}, {})
    assert (found.field, found.stored, found.asked) == ("a", 1, None)
    assert first_difference({"z": 1, "name": "x"}, {"z": 2, "name": "y"}).field == "name"


def test_nothing_of_a_study_lies_outside_its_folder(tmp_path, tiny, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    search(capsys, tmp_path / "runs", [*tiny, "n_trials=1"])
    assert os.listdir(tmp_path) == ["runs"]  # noqa: PTH208
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo"]
