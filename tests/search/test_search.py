"""The search: baselines first, equal budgets, nothing trained twice, failures recorded, a report and a model left."""

import csv
import errno
import json
import logging
import math
from pathlib import Path

import pytest

import hybridnas
from hybridnas.arch.presets import DEFAULT_BASELINES as BASELINES
from hybridnas.cli import search as cli
from hybridnas.cli.compose import compose
from hybridnas.errors import ConfigError, MatchError, StudyError, TrainingError
from hybridnas.report import callbacks as reporting
from hybridnas.report.callbacks import ConsoleLines
from hybridnas.search.config import Budget
from hybridnas.search.pruning import hyperband
from hybridnas.search.pruning.promotion import Promotion
from hybridnas.search.replay import replay
from hybridnas.studies import Study
from hybridnas.study import records
from hybridnas.study.folder import completed
from hybridnas.train import experiment
from hybridnas.train.records import TrainResult

CANDIDATES = (
    "space.candidates=[{name: a, motif: ME, n_experts: 2},{name: b, motif: MF},{name: c, motif: ME, n_experts: 2}]"
)
LISTED = ["space.letters=[]", "space.motif_length=[]", "space.requires=[]", "space.split=null", CANDIDATES]


def search_config(settings):
    """Return the SearchConfig that the command line would make of these settings."""
    config = compose("search", settings)
    config["space"] = {key: value for key, value in config["space"].items() if value is not None}
    if config["space"].get("candidates"):
        config["space"].pop("n_experts", None)
    return cli.search_config(config)


def run(folder, settings, news=None):
    config = search_config(["budget=smoke", f"runs={folder}", *settings])
    return Study.of(config).run([ConsoleLines(news)] if news else [])


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    """One search of eight trials: five baselines and three drawn ones."""
    lines = []
    folder = tmp_path_factory.mktemp("runs")
    summary = run(folder, [*tiny, "study=demo", "n_trials=8"], lines.append)
    return summary, lines


def test_trials_0_to_4_are_the_presets(study):
    summary, _ = study
    assert [record.preset for record in summary.records[:5]] == list(BASELINES)
    assert all(record.state == "COMPLETE" for record in summary.records[:5])
    assert all(record.preset is None for record in summary.records[5:])


def test_every_trained_trial_has_the_same_active_parameters_within_two_percent(study):
    summary, _ = study
    target = summary.records[0].cost["active_params"]
    trained = [record for record in summary.records if record.state in ("COMPLETE", "PRUNED")]
    assert len(trained) == 8
    for record in trained:
        assert abs(record.cost["active_params"] - target) <= 0.02 * target


def test_every_trial_reads_the_same_data_with_the_same_settings(study):
    summary, _ = study
    runs = [json.loads(path.read_text()) for path in sorted((summary.folder / "trials").glob("*/run.json"))]
    assert len({json.dumps(run["train"], sort_keys=True) for run in runs}) == 1
    assert len({run["data"]["fingerprint"] for run in runs}) == 1
    assert runs[0]["train"]["seed"] == 0


def test_batch_0_is_the_same_for_all_trials(tmp_path, tiny, monkeypatch):
    seen = []
    real = experiment.train_run

    def spy(arch, source, config, **rest):
        seen.append(source.train_batch(0, config.batch_size, config.seq_len, config.seed).inputs_BL.tolist())
        return real(arch, source, config, **rest)

    monkeypatch.setattr(experiment, "train_run", spy)
    run(tmp_path, [*tiny, "n_trials=3"])
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


def test_the_winner_is_the_completed_trial_of_lowest_loss(study):
    summary, _ = study
    done = [record for record in summary.records if record.state == "COMPLETE"]
    assert summary.best.valid_loss == min(record.valid_loss for record in done)
    assert summary.ended == "completed"


def test_report_leaderboard_and_model_are_left_behind(study):
    summary, _ = study
    assert summary.report == summary.folder / "report.html"
    assert summary.best.pattern in summary.report.read_text()
    with (summary.folder / "leaderboard.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(summary.records)
    assert float(lines[0]["valid_loss"]) == summary.best.valid_loss
    assert "load" in (summary.exported / "README.md").read_text()
    model = hybridnas.load(summary.exported)
    assert model.arch.fingerprint() == summary.best.fingerprint


def test_the_news_say_what_is_compared(study):
    _, lines = study
    text = "\n".join(lines)
    assert "every candidate has" in text
    assert "active parameters and trains for" in text
    assert "moe_mamba ME  loss" in text
    assert "to moe_mamba" in text


def test_records_tell_the_whole_story(study):
    summary, _ = study
    for record in summary.records:
        if record.state == "INFEASIBLE":
            continue
        stored = records.read_record(summary.folder / "trials" / f"{record.number:04d}")
        assert stored.to_dict() == record.to_dict()
        assert record.seed == 0
        assert math.isfinite(record.valid_loss)
        assert record.rungs[-1][1] == record.valid_loss
    drawn = next(record for record in summary.records if record.preset is None and record.state != "INFEASIBLE")
    assert drawn.choices["motif_length"] == 2
    assert {"slot0", "slot1"} <= set(drawn.choices)


def test_a_replay_is_equal_to_the_bit(study):
    summary, _ = study
    again = replay(summary.folder, summary.best.number)
    assert again.identical
    assert again.pairs[-1][1] == again.pairs[-1][2] == summary.best.valid_loss
    once_more = replay(summary.folder, summary.best.number)
    assert once_more.identical


def test_a_replay_trains_anew_each_time(study, tmp_path):
    summary, _ = study
    replay(summary.folder, 2, out=tmp_path / "again")
    with pytest.raises(StudyError, match="holds a finished run; give out=FOLDER another one"):
        replay(summary.folder, 2, out=tmp_path / "again")


def test_a_replay_of_an_unknown_trial_names_the_trained_ones(study):
    summary, _ = study
    with pytest.raises(StudyError, match="no trained trial 99; trained: 0, 1, 2, 3, 4, ") as caught:
        replay(summary.folder, 99)
    trained = [record.number for record in summary.records if record.state in ("COMPLETE", "PRUNED")]
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("trial", 99, trained)


def test_a_replay_on_other_data_is_refused(tmp_path, tiny):
    text = tmp_path / "words.txt"
    text.write_text("".join(f"state space expert mamba token router layer {n}\n" for n in range(400)))
    summary = run(tmp_path, [*tiny, f"data.path={text}", "n_trials=1"])
    text.write_text("".join(f"another text altogether, of other words {n}\n" for n in range(400)))
    with pytest.raises(StudyError, match="was searched on other data"):
        replay(summary.folder, 0)


def test_a_candidate_in_two_spellings_is_trained_once(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, *LISTED, "sampler=bruteforce", "space.baselines=[]", "n_trials=9"])
    assert [record.state for record in summary.records] == ["COMPLETE", "COMPLETE", "DUPLICATE"]
    first, _, again = summary.records
    assert again.duplicate_of == 0
    assert again.valid_loss == first.valid_loss
    assert again.fingerprint == first.fingerprint
    assert "the architecture of trial 0, whose result (COMPLETE) is reused" in again.reason
    assert not (summary.folder / "trials/0002/metrics.jsonl").exists()
    assert summary.ended == "exhausted"
    assert [record.choices["candidate"] for record in summary.records] == ["a", "b", "c"]
    again = replay(summary.folder, 2)
    assert again.identical
    assert again.record.number == 0


def test_brute_force_tries_every_combination_once(tmp_path, tiny):
    settings = ["space=attention_placement", "sampler=bruteforce", "pruner=none", "n_trials=99"]
    summary = run(tmp_path, [*tiny, *settings, "space.baselines=[]", "space.n_inserted=[0,1]"])
    drawn = [json.dumps(dict(record.choices)) for record in summary.records]
    assert len(drawn) == len(set(drawn)) == 5
    assert summary.ended == "exhausted"


def test_a_candidate_that_sees_later_tokens_is_infeasible_and_the_others_are_trained(tmp_path, tiny):
    candidates = "space.candidates=[{name: seer, motif: ME, router: expert_choice},{name: good, motif: ME}]"
    summary = run(tmp_path, [*tiny, *LISTED[:-1], candidates, "sampler=bruteforce", "space.baselines=[]", "n_trials=5"])
    seer, good = summary.records
    assert (seer.state, good.state) == ("INFEASIBLE", "COMPLETE")
    assert "is not causal" in seer.reason
    assert summary.best.number == good.number


def test_a_trial_is_replayed_from_another_folder_though_its_data_had_a_relative_path(tmp_path, tiny, monkeypatch):
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    for folder in (begun, elsewhere):
        folder.mkdir()
    (begun / "words.txt").write_text("".join(f"state space expert mamba token router layer {n}\n" for n in range(400)))
    (elsewhere / "words.txt").write_text("".join(f"another text altogether, of other words {n}\n" for n in range(400)))
    monkeypatch.chdir(begun)
    summary = run(tmp_path / "runs", [*tiny, "data.path=words.txt", "n_trials=1"])
    monkeypatch.chdir(elsewhere)
    assert replay(summary.folder, 0).identical
    assert Path.cwd() == elsewhere


def test_infeasible_draws_are_recorded_with_their_reason(tmp_path, tiny):
    candidates = "space.candidates=[{name: wide, pattern: 'AA{head_dim=8192}'},{name: good, motif: ME}]"
    summary = run(tmp_path, [*tiny, *LISTED[:-1], candidates, "sampler=bruteforce", "space.baselines=[]", "n_trials=5"])
    bad, good = summary.records
    assert (bad.state, good.state) == ("INFEASIBLE", "COMPLETE")
    assert bad.reason.startswith("active_params=")
    assert dict(bad.choices) == {"candidate": "wide"}
    assert not (summary.folder / "trials/0000/arch.json").exists()


def test_a_target_that_nothing_reaches_ends_the_search(tmp_path, tiny):
    with pytest.raises(ConfigError, match=r"most often: active_params=30 lies below what") as caught:
        run(tmp_path, [*tiny, "budget.active_params=30"])
    assert caught.value.field == "budget.active_params"
    with pytest.raises(MatchError, match=r"the first 5 candidates are all infeasible, the last one because: .*active"):
        run(tmp_path, [*tiny, "budget.active_params=30", "space.requires=[]"])


def test_a_trial_that_crashes_is_a_failure_with_its_reason_and_the_search_goes_on(tmp_path, tiny, monkeypatch):
    real = experiment.train_run

    def sometimes(arch, source, config, *, folder, **rest):
        if folder.name == "0001":
            raise RuntimeError("the kernel gave up\nmore words")
        return real(arch, source, config, folder=folder, **rest)

    monkeypatch.setattr(experiment, "train_run", sometimes)
    lines = []
    summary = run(tmp_path, [*tiny, "n_trials=4"], lines.append)
    assert [record.state for record in summary.records] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert summary.records[1].reason.startswith("RuntimeError: the kernel gave up")
    assert "more words" in (summary.folder / "trials/0001/error.txt").read_text()
    assert any("failed: RuntimeError: the kernel gave up" in line for line in lines)
    assert summary.records[1].valid_loss is None
    again = replay(summary.folder, 1)  # by the same runner: a crash is a result here, too
    assert (again.result.status, again.evals) == ("failed", [])
    assert again.result.reason.startswith("RuntimeError: the kernel gave up")


def test_a_trial_that_diverges_is_a_failure_with_its_reason(tmp_path, tiny, monkeypatch):
    real = experiment.train_run

    def wild(arch, source, config, *, folder, **rest):
        return real(arch, source, config.replace(lr=1e8) if folder.name == "0000" else config, folder=folder, **rest)

    monkeypatch.setattr(experiment, "train_run", wild)
    summary = run(tmp_path, [*tiny, "n_trials=2", "budget.tokens_per_active_param=1"])
    first, second = summary.records
    assert (first.state, second.state) == ("FAIL", "COMPLETE")
    assert "lower train.lr=1e+08" in first.reason
    assert summary.best is second or summary.best.number == 1


def test_when_everything_fails_the_search_says_so(tmp_path, tiny, monkeypatch):
    def never(arch, source, config, *, folder, **rest):
        return TrainResult("failed", "diverged in step 3", [], None, folder)

    monkeypatch.setattr(experiment, "train_run", never)
    with pytest.raises(TrainingError, match="the first 5 trials all failed, the last one because: diverged in step 3"):
        run(tmp_path, tiny)
    assert len(records.load_records(completed(tmp_path / "mamba_moe-smoke"))[0]) == 5


def test_a_stop_by_the_pruner_is_recorded_as_pruned(tmp_path, tiny, monkeypatch):
    asked, real = [], hyperband.stops

    def stops(view, history, number, reached, marks):
        asked.append(number)
        return True, real(view, history, number, reached, marks)[1]

    monkeypatch.setattr(hyperband, "stops", stops)
    summary = run(tmp_path, [*tiny, "pruner=hyperband", "n_trials=6", "sampler=random", "seed=3"])
    trained = [record for record in summary.records if record.state in ("COMPLETE", "PRUNED")]
    assert asked == [record.number for record in trained]  # presets enter the rungs, but run to the end
    assert [record.state for record in trained] == ["COMPLETE"] * 5 + ["PRUNED"]
    last = trained[-1]
    assert last.tokens == last.rungs[-1][0] < summary.records[0].tokens
    assert last.reason.startswith(f"pruned at {last.tokens:,} of {summary.records[0].tokens:,} tokens")


def test_n_trials_counts_what_was_trained(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, "n_trials=2"])
    assert [record.preset for record in summary.records] == ["moe_mamba", "mamba"]


def test_the_minutes_end_a_search_after_its_baselines(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, "n_trials=50", "minutes=0.0001"])
    assert summary.ended == "time"
    assert [record.preset for record in summary.records] == list(BASELINES)


def test_the_rungs_are_whole_steps_and_multiples(tiny):
    budget = Budget(d_model=16, depth=2, rungs=3, reduction=3, seq_len=32, batch_size=4, evals=4)
    rungs = budget.rung_tokens(5000)
    assert [rung % budget.step_tokens for rung in rungs] == [0, 0, 0]
    assert rungs[1] == 3 * rungs[0]
    assert rungs[2] == 9 * rungs[0] >= 20 * 5000
    assert set(rungs) <= set(budget.eval_tokens(5000))
    assert len(budget.eval_tokens(5000)) >= 4


def test_rungs_may_grow_by_another_factor_than_the_one_by_which_candidates_fall_away():
    budget = Budget(d_model=8, depth=2, seq_len=8, batch_size=2, rungs=3, reduction=3, growth=2)
    assert budget.rung_tokens(5000) == (25_008, 50_016, 100_032)
    promotion = Promotion(budget.rung_tokens(5000), budget.reduction, 9)
    assert (promotion.remainder, Promotion((16,), 3, 9).remainder) == (0.5, 1.0)


def test_a_full_disk_ends_the_search_in_one_sentence_and_loses_nothing(tmp_path, tiny, monkeypatch):
    real = reporting.write_leaderboard
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "leaderboard.csv")
        return real(*args)

    monkeypatch.setattr(reporting, "write_leaderboard", full)
    with pytest.raises(
        StudyError, match=r"leaderboard.csv cannot be written or read \(No space left on device\)"
    ) as one:
        run(tmp_path, [*tiny, "n_trials=3"])
    assert "\n" not in str(one.value)
    summary = run(tmp_path, [*tiny, "n_trials=3"])
    assert [record.state for record in summary.records] == ["COMPLETE"] * 3


def test_a_disk_that_fills_while_a_record_is_written_costs_no_trial(tmp_path, tiny, monkeypatch):
    real = records.write_text

    def full(path, text, **rest):
        if path.parent.name == "0001" and '"COMPLETE"' in text:
            path.with_name(".torn").write_text(text[:99])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **rest)

    monkeypatch.setattr(records, "write_text", full)
    with pytest.raises(StudyError, match="No space left on device"):
        run(tmp_path, [*tiny, "n_trials=2"])
    monkeypatch.undo()
    summary = run(tmp_path, [*tiny, "n_trials=2"])
    assert [(record.number, record.state) for record in summary.records] == [(0, "COMPLETE"), (1, "COMPLETE")]


def test_a_disk_that_refuses_a_checkpoint_fails_the_search_and_not_the_trial(tmp_path, tiny, monkeypatch):
    def full(*args, **rest):
        raise TrainingError("trials/0000: checkpoint could not be written (no space left on the disk)")

    monkeypatch.setattr(experiment, "train_run", full)
    with pytest.raises(TrainingError, match="no space left on the disk"):
        run(tmp_path, tiny)
    assert records.load_records(completed(tmp_path / "mamba_moe-smoke"))[0] == []


@pytest.mark.parametrize(
    ("settings", "field", "got"),
    [
        (["device=gpu7"], "device", "gpu7"),
        (["data.valid_fraction=2"], "valid_fraction", 2),
        (["budget.d_model=0"], "d_model", 0),
        (["space.n_expert=[2]"], "n_expert", "n_expert"),
        (["seed=99999999999999999999"], "seed", 99999999999999999999),
    ],
)
def test_settings_are_checked_before_a_folder_is_made(tmp_path, tiny, settings, field, got):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, [*tiny, *settings])
    assert str(caught.value.field).endswith(field)
    assert caught.value.got == got
    assert list(tmp_path.iterdir()) == []


def test_mlflow_shows_every_trial_with_its_state(tmp_path, tiny, monkeypatch):
    from hybridnas.tracking.mlflow import connect, default_uri, search_runs

    real = experiment.train_run

    def second_fails(arch, source, config, *, folder, **rest):
        if folder.name == "0001":
            raise RuntimeError("gave up")
        return real(arch, source, config, folder=folder, **rest)

    monkeypatch.setattr(experiment, "train_run", second_fails)
    monkeypatch.setattr(hyperband, "stops", lambda view, history, number, reached, marks: (True, dict(marks)))
    summary = run(tmp_path, [*tiny, "n_trials=6", "tracking=null"])
    client = connect(default_uri(summary.folder))
    where = client.get_experiment_by_name("hybridnas").experiment_id
    children = search_runs(client, where, "tags.`hybridnas.kind` = 'trial'")
    status = {int(run.data.tags["hybridnas.trial"]): run.info.status for run in children}
    names = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED", "INFEASIBLE": "FAILED"}
    assert status == {record.number: names[record.state] for record in summary.records}
    assert {"FINISHED", "KILLED", "FAILED"} == set(status.values())
    (parent,) = search_runs(client, where, "tags.`hybridnas.kind` = 'study'")
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    best = next(run for run in children if run.data.tags["hybridnas.trial"] == str(summary.best.number))
    assert best.data.metrics["best_valid_loss"] == summary.best.valid_loss


def test_an_unreachable_tracking_server_costs_one_warning(tmp_path, tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="hybridnas"):
        summary = run(tmp_path, [*tiny, "n_trials=2", "tracking=http://127.0.0.1:9"])
    warned = [record for record in caplog.records if record.name.startswith("hybridnas")]
    assert len(warned) == 1
    assert "127.0.0.1:9" in warned[0].getMessage()
    assert [record.state for record in summary.records] == ["COMPLETE", "COMPLETE"]
