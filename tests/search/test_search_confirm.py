"""Confirmation: fresh seeds, pairs, intervals, and the winner that other seeds choose."""

import csv
import dataclasses
import json
import math
import statistics

import pytest

import hybridnas
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.errors import StudyError
from hybridnas.report.leaderboard import winner
from hybridnas.search import confirm
from hybridnas.search import reference as rival
from hybridnas.search.runner import Search
from hybridnas.study.records import TrialRecord, load_records, trained_tokens


def run(folder, settings, news=None):
    config = compose("search", ["budget=smoke", f"runs={folder}", *settings])
    return Search(search_config(config), news).run()


def record(number, loss, preset=None, **fields):
    fields.setdefault("objectives", {"val_loss": loss})
    return TrialRecord(number=number, state="COMPLETE", valid_loss=loss, preset=preset, **fields)


def test_the_interval_is_that_of_a_paired_t_test_computed_by_hand():
    a, b = {"1": 1.0, "2": 1.2, "3": 1.1}, {"1": 1.3, "2": 1.4, "3": 1.45}
    found = confirm.paired(a, b)
    gaps = [-0.3, -0.2, -0.35]
    assert found.n == 3
    assert found.mean == pytest.approx(statistics.fmean(gaps))
    assert found.half == pytest.approx(4.302652729911275 * statistics.stdev(gaps) / math.sqrt(3))
    assert found.clear
    assert found.words("x", "y").startswith("x is better than y: -0.2833 ± 0.1897 nats per token (95% interval over 3")
    assert confirm.paired(b, a).words("y", "x").startswith("y is worse than x: +0.2833")


def test_a_difference_inside_the_noise_is_called_so():
    found = confirm.paired({"1": 1.0, "2": 1.5}, {"1": 1.1, "2": 1.3})
    assert not found.clear
    assert found.words("x", "y").startswith("the difference between x and y is inside the noise: +0.0500 ± ")
    alone = confirm.paired({"1": 1.0, "2": None}, {"1": 1.1, "2": 1.3})
    assert (alone.n, alone.half) == (1, None)
    assert "too few for an interval" in alone.words("x", "y")


def test_other_seeds_choose_the_winner_and_a_failed_one_cannot_win():
    lucky = record(1, 1.0, confirmed={"1": 1.6, "2": 1.5})
    solid = record(2, 1.1, confirmed={"1": 1.2, "2": 1.3})
    broken = record(3, 0.9, confirmed={"1": 0.8, "2": None})
    unasked = record(4, 0.5)
    assert winner([lucky, solid, broken, unasked]).number == 2
    assert winner([lucky, dataclasses.replace(solid, confirmed={"1": 1.2})]).number == 1  # not the same seeds yet
    assert confirm.confirmed_winner([dataclasses.replace(lucky, confirmed={"1": 1.6})]) is None
    found = confirm.summaries([lucky, solid, broken, unasked])
    assert [one.record.number for one in found] == [2, 1, 3]
    assert found[0].error == pytest.approx(0.05)
    assert found[2].value is None


def test_accuracy_is_confirmed_in_its_own_direction():
    better = record(1, 2.0, objectives={"accuracy": 0.5}, confirmed={"1": 0.6, "2": 0.7})
    worse = record(2, 1.0, objectives={"accuracy": 0.6}, confirmed={"1": 0.5, "2": 0.6})
    assert winner([better, worse]).number == 1
    assert confirm.summaries([better])[0].value == pytest.approx(0.65)
    assert confirm.paired(confirm.turned(better), confirm.turned(worse)).mean == pytest.approx(-0.1)


def test_the_best_drawn_ones_and_every_baseline_are_confirmed():
    records = [record(0, 1.0, "moe_mamba"), *(record(n, 2.0 - n / 10) for n in range(1, 6))]
    assert [one.number for one in confirm.chosen(records, 2)] == [0, 5, 4]
    stopped = dataclasses.replace(records[5], state="PRUNED")
    assert [one.number for one in confirm.chosen([*records[:5], stopped], 2)] == [0, 4, 3]
    assert confirm.fresh_seeds(7, 3) == [8, 9, 10]


CONFIRM = ["study=demo", "pruner=halving", "n_trials=8", "confirm=on", "confirm_top=2", "confirm_seeds=2"]
BASELINES = "space.baselines=[moe_mamba,mamba]"


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    said = []
    folder = tmp_path_factory.mktemp("runs")
    summary = run(folder, [*tiny, BASELINES, *CONFIRM, "against=random"], said.append)
    return summary, said


def test_the_best_and_the_baselines_are_trained_with_fresh_seeds(study):
    summary, said = study
    sure = [one for one in summary.records if one.confirmed]
    assert len(sure) == 4
    assert all(set(one.confirmed) == {"1", "2"} for one in sure)
    for one in sure:
        for seed, value in one.confirmed.items():
            folder = summary.folder / f"trials/{one.number:04d}/confirm/seed{seed}"
            ran = json.loads((folder / "run.json").read_text())
            assert (ran["train"]["seed"], ran["status"]) == (int(seed), "completed")
            assert value == json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"]
            assert not list(folder.glob("checkpoint*"))
    assert len({json.dumps(one.confirmed) for one in sure}) == 4
    assert any("confirming trial   0  moe_mamba  seed 1: " in line for line in said)


def test_the_confirmed_winner_is_exported_and_stands_in_the_leaderboard(study):
    summary, _ = study
    best = min((one for one in summary.records if one.confirmed), key=lambda r: statistics.fmean(r.confirmed.values()))
    assert summary.best.number == best.number
    assert hybridnas.load(summary.exported).arch.fingerprint() == best.fingerprint
    with (summary.folder / "leaderboard.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if int(row["trial"]) == best.number)
    assert float(row["confirmed_mean"]) == pytest.approx(statistics.fmean(best.confirmed.values()))
    assert row["confirmed_seeds"] == "2"


def test_a_random_search_of_equal_cost_is_the_rival(study):
    summary, said = study
    found = rival.read_rival(summary.folder)
    assert found.study == "demo-random"
    theirs, _ = load_records(summary.folder.parent / "demo-random")
    ours = trained_tokens(summary.records)
    full = summary.best.tokens
    assert ours <= found.tokens == trained_tokens(theirs) <= ours + 2 * full
    drawn = [one for one in theirs if one.preset is None and one.state == "COMPLETE"]
    assert found.record.valid_loss == min(one.valid_loss for one in drawn)
    assert set(found.confirmed) == {"1", "2"}
    assert found.steps[-1][1] == min(one.valid_loss for one in theirs if one.state == "COMPLETE")
    assert any("searching at random, too" in line for line in said)


def test_confirming_again_trains_nothing(study, tiny, monkeypatch):
    summary, _ = study
    before = {path: path.stat().st_mtime_ns for path in summary.folder.glob("trials/*/confirm/*/metrics.jsonl")}
    assert len(before) == 8
    again = run(summary.folder.parent, [*tiny, BASELINES, *CONFIRM, "against=demo-random"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.best.number == summary.best.number


def test_a_confirmation_that_was_stopped_goes_on(tmp_path, tiny, monkeypatch):
    real, calls = confirm.train_again, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(confirm, "train_again", stop)
    settings = [*tiny, BASELINES, *CONFIRM]
    first = run(tmp_path, settings)
    assert first.ended == "interrupted"
    assert "unconfirmed" in first.report.read_text()
    second = run(tmp_path, settings)
    assert second.ended == "completed"
    assert len(calls) == 3 + 6
    assert sum(len(one.confirmed) for one in second.records) == 8


def test_a_study_of_another_budget_is_no_rival(study, tiny):
    summary, _ = study
    other = [*tiny, BASELINES, "n_trials=3", "against=demo", "study=other", "budget.lr=0.01"]
    with pytest.raises(StudyError, match="study 'demo' has another budget than this one, so their results cannot be"):
        run(summary.folder.parent, other)
    with pytest.raises(StudyError, match=r"no study in .*absent"):
        run(summary.folder.parent, [*tiny, BASELINES, "n_trials=2", "against=absent", "study=third"])


def test_how_a_best_fell_counts_every_token_when_it_was_trained():
    records = [
        record(0, 3.0, legs=[[10.0, 100]]),
        dataclasses.replace(record(1, 2.5), state="PRUNED", legs=[[20.0, 30]]),
        record(2, 1.0, legs=[[30.0, 30], [50.0, 70]]),
        record(3, 2.0, legs=[[40.0, 100]]),
        record(4, 0.5, legs=[[5.0, 100]], preset="mamba"),  # what every study begins with is no find
    ]
    assert rival.progress(records) == [(100.0, 3.0), (260.0, 2.0), (330.0, 1.0)]
