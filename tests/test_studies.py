"""The Python API of a search: made, run, interrupted, run again, read, exported; and what old studies give."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hybridnas
from hybridnas.errors import ConfigError, StudyError
from hybridnas.study.callbacks import StudyCallback
from hybridnas.study.records import load_records, reference_of

SIZES = {
    **{"d_model": 16, "depth": 2, "n_experts": 2, "multiple": 1, "seq_len": 32, "batch_size": 4, "minutes": None},
    **{"tokens_per_active_param": 0.2, "rungs": 2, "reduction": 2, "evals": 2, "valid_tokens": 256},
}
OLD = Path(__file__).parent / "study" / "version_0_1" / "old"


@pytest.fixture(scope="module")
def settings(corpus, tmp_path_factory):
    data = {"kind": "text", "path": str(corpus)}
    runs = str(tmp_path_factory.mktemp("runs"))
    return {"budget": "smoke", "data": data, "runs": runs, "tracking": "off", "n_trials": 8, **SIZES}


class Events(StudyCallback):
    """Writes down what is called, and may press Ctrl-C after some trials."""

    def __init__(self, interrupt_after=None):
        self.names, self.ended, self.interrupt_after = [], [], interrupt_after

    def on_study_start(self, event):
        self.names.append("study_start")

    def on_trial_start(self, event):
        self.names.append("trial_start")
        assert event.record.state == "RUNNING"
        if self.interrupt_after is not None and len(self.ended) >= self.interrupt_after:
            raise KeyboardInterrupt

    def on_trial_eval(self, event):
        self.names.append("trial_eval")
        assert event.values["tokens"] > 0

    def on_trial_end(self, event):
        self.names.append("trial_end")
        self.ended.append(event.record)
        assert event.records[event.record.number] == event.record

    def on_study_end(self, event):
        self.names.append(f"study_end {event.ended}")


@pytest.fixture(scope="module")
def study(settings):
    events = Events()
    made = hybridnas.create_study("mamba_moe", name="whole", **settings)
    made.run([events])
    return made, events


def contents(folder):
    """Return what every file of a folder holds, locks left out."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def plain(records):
    left_out = ("legs", "seconds", "draw_seconds", "tokens_per_second", "curve", "deaths")
    return [{key: value for key, value in record.to_dict().items() if key not in left_out} for record in records]


def test_a_study_is_made_run_and_read(study):
    made, events = study
    assert (made.name, made.path.name) == ("whole", "whole")
    states = [trial.state for trial in made.trials]
    assert sum(state in ("COMPLETE", "PRUNED") for state in states) == 8
    assert [trial.number for trial in made.trials] == list(range(len(states)))
    done = [trial for trial in made.trials if trial.state == "COMPLETE"]
    assert made.best.scores["val_loss"] == min(trial.scores["val_loss"] for trial in done)
    assert made.best.arch.fingerprint() == made.best.record.fingerprint
    assert made.best.cost["active_params"] == made.best.arch.cost(32).active_params
    assert made.best.model().arch.fingerprint() == made.best.record.fingerprint
    assert events.names[0] == "study_start"
    assert events.names[-1] == "study_end completed"
    assert {record.number for record in events.ended} == set(range(len(states)))  # one that was paused ends twice
    trained = sum(state in ("COMPLETE", "PRUNED") for state in states)
    assert events.names.count("trial_start") >= trained
    assert events.names.count("trial_eval") == sum(len(trial.curve) for trial in made.trials)


def test_nothing_is_printed_and_progress_is_logged(settings, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="hybridnas.search"):
        hybridnas.create_study("mamba_moe", name="silent", **{**settings, "n_trials": 1}).run()
    assert capsys.readouterr() == ("", "")
    assert any("every candidate has" in record.getMessage() for record in caplog.records)


def test_a_study_that_was_interrupted_goes_on_to_the_same_records(study, settings):
    whole, _ = study
    made = hybridnas.create_study("mamba_moe", name="whole", **{**settings, "runs": settings["runs"] + "/b"})
    for after in (2, 3):
        events = Events(interrupt_after=after)
        assert made.run([events]).ended == "interrupted"
        assert events.names[-1] == "study_end interrupted"
    assert made.run().ended == "completed"
    assert plain(made.records) == plain(whole.records)
    before = {path: path.stat().st_mtime_ns for path in made.path.glob("trials/*/result.json")}
    assert made.run().ended == "completed"  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in made.path.glob("trials/*/result.json")} == before


def test_a_loaded_study_is_the_one_that_was_run_and_goes_on(study):
    made, _ = study
    loaded = hybridnas.load_study(made.path)
    assert loaded.records == made.records
    assert loaded.config.identity() == made.config.identity()
    assert loaded.run().ended == "completed"
    assert loaded.records == made.records


def test_a_study_is_loaded_without_training_libraries(study):
    made, _ = study
    code = (
        "import sys, hybridnas\n"
        f"study = hybridnas.load_study({str(made.path)!r})\n"
        "assert study.best.scores['val_loss'] > 0 and study.trials and study.name == 'whole'\n"
        "print(sorted({'torch', 'optuna', 'mlflow', 'hydra', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_study_as_a_table(study):
    pandas = pytest.importorskip("pandas")
    made, _ = study
    frame = made.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["number"]) == [trial.number for trial in made.trials]
    assert list(frame["pattern"]) == [record.pattern for record in made.records]
    assert frame.loc[made.best.number, "val_loss"] == made.best.scores["val_loss"]
    assert {"state", "preset", "params", "active_params", "state_bytes", "tokens", "choice.slot0"} <= set(frame)


def test_the_report_is_made_from_the_records_at_any_time(study):
    made, _ = study
    (made.path / "report.html").unlink()
    (made.path / "leaderboard.csv").unlink()
    assert made.report() == made.path / "report.html"
    assert made.best.record.pattern in made.report().read_text(encoding="utf-8")
    assert (made.path / "leaderboard.csv").is_file()


def test_the_best_is_exported_with_its_card(study, tmp_path):
    made, _ = study
    folder = made.export(tmp_path / "model")
    assert hybridnas.load(folder).arch.fingerprint() == made.best.record.fingerprint
    assert "whole" in (folder / "README.md").read_text(encoding="utf-8")


def test_a_trial_without_weights_says_so(study):
    made, _ = study
    record = next(trial for trial in made.trials if trial.state == "PRUNED" or trial.number == 1)
    for path in (made.path / f"trials/{record.number:04d}").glob("checkpoint*"):
        path.unlink()
    if record.record.fingerprint == made.best.record.fingerprint:
        pytest.skip("the best one lies in best/, too")
    with pytest.raises(StudyError) as caught:
        record.model()
    assert (caught.value.field, caught.value.got) == ("trial", record.number)


def test_another_study_in_the_folder_is_refused_and_changes_nothing(study, settings):
    made, _ = study
    before, holder = contents(made.path), (made.path / ".lock").read_text()
    events = Events()
    other = hybridnas.create_study("mamba_moe", name="whole", **{**settings, "seed": 5})
    with pytest.raises(StudyError) as caught:
        other.run([events])
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("seed", 5, 0)
    assert events.names == []
    assert contents(made.path) == before
    assert (made.path / ".lock").read_text() == holder


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"space": "mamba_mo"}, "space"),
        ({"budget": "laptp"}, "budget"),
        ({"n_trial": 3}, "n_trial"),
        ({"depth": 0}, "budget.depth"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"sampler": "evolutoin"}, "sampler"),
        ({"objectives": ["val_los"]}, "objectives"),
        ({"tracking": True}, "tracking"),
    ],
)
def test_settings_are_checked_when_a_study_is_made(given, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        hybridnas.create_study(**given)
    assert str(caught.value.field).endswith(field)
    assert list(tmp_path.iterdir()) == []


def test_no_tracking_may_be_written_as_false_and_true_is_refused_with_the_word_for_it():
    assert hybridnas.create_study(tracking=False).config.tracking == "off"
    with pytest.raises(ConfigError) as caught:
        hybridnas.create_study(tracking=True)
    assert (caught.value.field, caught.value.got) == ("tracking", True)
    assert caught.value.allowed == "text or none, 'off'"


@pytest.mark.parametrize("field", ["space", "budget", "data"])
def test_what_is_neither_name_nor_mapping_is_refused(field):
    with pytest.raises(ConfigError) as caught:
        hybridnas.create_study(**{field: None})
    assert (caught.value.field, caught.value.got) == (field, "NoneType")


@pytest.mark.parametrize("given", [{"callbacks": StudyCallback()}, {"callbacks": [print]}, {"training": [print]}])
def test_callbacks_that_are_none_are_refused_and_no_study_begins(given, settings, tmp_path):
    study = hybridnas.create_study(name="refused", **{**settings, "runs": str(tmp_path)})
    with pytest.raises(ConfigError) as caught:
        study.run(**given)
    assert caught.value.field == next(iter(given))
    assert not study.path.exists()


def test_names_mappings_and_configs_describe_the_same_study(settings, tmp_path, monkeypatch):
    from hybridnas.data import source_config
    from hybridnas.search.config import Budget
    from hybridnas.search.named import list_budgets, named_budget
    from hybridnas.search_spaces.listing import space_settings

    monkeypatch.chdir(tmp_path)
    named = hybridnas.create_study("hybrid", "smoke", "stdlib")
    spelled = hybridnas.create_study(space_settings("hybrid"), named_budget("smoke"), {"kind": "stdlib"})
    objects = hybridnas.create_study(
        space_settings("hybrid"), Budget.from_dict(named_budget("smoke")), source_config({"kind": "stdlib"})
    )
    assert named.config.identity() == spelled.config.identity() == objects.config.identity()
    assert named.name == spelled.name == objects.name
    assert re.fullmatch("hybrid-smoke-[0-9a-f]{4}", named.name)
    for change in ({"seed": 1}, {"depth": 5}, {"objectives": ("accuracy",)}, {"max_params": 1e6}):
        assert hybridnas.create_study("hybrid", "smoke", "stdlib", **change).name != named.name
    assert hybridnas.create_study("hybrid", "smoke", "stdlib", n_trials=3, minutes=9.0).name == named.name
    assert {"laptop", "smoke"} <= set(list_budgets())


def test_a_study_that_is_not_there_lists_those_that_are(study):
    made, _ = study
    with pytest.raises(StudyError, match=r"studies there: .*whole"):
        hybridnas.load_study(made.path.with_name("absent"))


def test_a_study_of_version_0_1_can_be_read_and_not_searched_in(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    study = hybridnas.load_study(tmp_path / "old")
    assert [trial.number for trial in study.trials] == [0, 1, 2, 3, 5, 6, 7, 8, 11]  # between them: promotions
    assert study.best.scores["val_loss"] == min(t.scores["val_loss"] for t in study.trials if t.state == "COMPLETE")
    assert study.best.arch.fingerprint() == study.best.record.fingerprint
    assert len(study.to_dataframe()) == 9
    assert study.best.record.pattern in study.report().read_text(encoding="utf-8")
    before = contents(study.path)
    with pytest.raises(StudyError) as caught:
        study.run()
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("format", 1, 2)
    assert contents(study.path) == before


def test_records_of_version_0_1_keep_what_they_say():
    records, warnings = load_records(OLD)
    assert warnings == []
    stored = {
        json.loads(path.read_text())["number"]: json.loads(path.read_text()) for path in OLD.glob("trials/*/r*.json")
    }
    for record in records:
        values = record.to_dict()
        assert {key: values[key] for key in stored[record.number] if key != "curve"} == {
            key: value for key, value in stored[record.number].items() if key != "curve"
        }


def test_events_of_workers_reach_the_callbacks_of_the_command(settings):
    events = Events()
    made = hybridnas.create_study("mamba_moe", name="two", **{**settings, "n_trials": 6, "workers": 2})
    assert made.run([events]).ended == "completed"
    assert (events.names[0], events.names[-1]) == ("study_start", "study_end completed")
    assert sorted(record.number for record in events.ended) == [trial.number for trial in made.trials]
    assert events.names.count("trial_eval") == sum(
        len(trial.curve) for trial in made.trials if not trial.record.duplicate_of
    )
    trained = [trial for trial in made.trials if trial.state in ("COMPLETE", "PRUNED")]
    assert events.names.count("trial_start") >= len(trained) == 6


def test_a_study_whose_space_has_no_reference_is_compared_with_none():
    assert reference_of({"identity": {"space": {"letters": ["M"]}}, "meta": {"reference": None}}) is None
    assert reference_of({"identity": {"space": {"letters": ["M"]}}, "meta": {"reference": "mamba"}}) == "mamba"
    assert reference_of({"identity": {"space": {"letters": ["M"]}}}) == "moe_mamba"  # of version 0.1


def test_a_wrong_space_is_refused_when_the_study_is_made():
    with pytest.raises(ConfigError) as found:
        hybridnas.create_study(space={"lettrs": ["M", "A"]}, budget="smoke")
    assert found.value.got == "lettrs"
