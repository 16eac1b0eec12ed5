"""Confirmation in a search: what is trained again, what is resumed, and the reference study beside it."""

import csv
import dataclasses
import json
import statistics

import pytest

import hybridnas
from hybridnas.analysis.verdict import contenders, verdict
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.errors import StudyError
from hybridnas.report.callbacks import ConsoleLines
from hybridnas.report.claims import study_documents
from hybridnas.search import confirm, reference
from hybridnas.studies import Study
from hybridnas.study.documents import read_documents
from hybridnas.study.records import TrialRecord, load_records, trained_tokens
from hybridnas.study.reference import read_reference_study


def run(folder, settings, news=None):
    config = compose("search", ["budget=smoke", f"runs={folder}", "confirm_workers=1", *settings])
    return Study.of(search_config(config)).run([ConsoleLines(news)] if news else [])


def record(number, loss, preset=None, **fields):
    fields.setdefault("objectives", {"val_loss": loss})
    return TrialRecord(number=number, state="COMPLETE", valid_loss=loss, preset=preset, **fields)


def test_the_best_drawn_ones_and_the_best_baselines_are_confirmed():
    records = [record(0, 1.0, "moe_mamba"), *(record(n, 2.0 - n / 10) for n in range(1, 6))]
    assert [one.number for one in confirm.chosen(records, 2, "moe_mamba")] == [0, 5, 4]
    stopped = dataclasses.replace(records[5], state="PRUNED")
    assert [one.number for one in confirm.chosen([*records[:5], stopped], 2, "moe_mamba")] == [0, 4, 3]
    baselines = [record(0, 3.0, "moe_mamba"), record(1, 1.2, "mamba"), record(2, 1.1, "a"), record(3, 1.3, "b")]
    assert [one.number for one in confirm.chosen([*baselines, *records[4:]], 2, "moe_mamba")] == [0, 1, 2, 5, 4]
    assert [one.number for one in confirm.chosen([*baselines, *records[4:]], 2, None)] == [1, 2, 5, 4]
    outside = dataclasses.replace(baselines[2], violation=0.5)
    assert [one.number for one in confirm.chosen([*baselines[:2], outside, baselines[3]], 2, None)] == [1, 3]
    unlucky = [
        dataclasses.replace(records[4], screened={"500": 1.0}),
        dataclasses.replace(records[5], screened={"500": 9.0}),
    ]
    assert [one.number for one in confirm.chosen([*records[:4], *unlucky], 1, None)] == [0, 4]
    failed = [dataclasses.replace(records[4], screened={"500": None}), unlucky[1]]
    assert [one.number for one in confirm.chosen([*records[:4], *failed], 1, None)] == [0, 5]
    assert confirm.fresh_seeds(7, 3) == [8, 9, 10]
    assert confirm.verdict_seeds(7, 2) == [1008, 1009]


CONFIRM = ["study=demo", "pruner=halving", "n_trials=8", "confirm=on", "confirm_top=2", "confirm_seeds=2"]
VERDICT = {"1001", "1002", "1003", "1004"}
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
        tests = {**one.confirmed_test, **one.verdict_test}
        for seed, value in {**one.confirmed, **one.verdict}.items():
            folder = summary.folder / f"trials/{one.number:04d}/confirm/seed{seed}"
            ran = json.loads((folder / "run.json").read_text())
            assert (ran["train"]["seed"], ran["status"]) == (int(seed), "completed")
            last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
            assert (value, tests[seed]) == (last["valid_loss"], last["aux"]["test_loss"])
            sums = read_documents(folder)
            assert sum(sums.nats) / sum(sums.tokens) == pytest.approx(tests[seed])
            assert not list(folder.glob("checkpoint*"))
    assert len({json.dumps(one.confirmed) for one in sure}) == 4
    assert any("confirming trial   0  moe_mamba  seed 1: " in line for line in said)
    done = [one for one in summary.records if one.state == "COMPLETE"]
    assert all(one.test_loss == one.curve[-1]["test_loss"] for one in done)
    assert all("test_loss" not in entry for one in summary.records for entry in one.curve[:-1])


def test_the_winner_and_what_it_is_compared_with_have_seeds_that_chose_nothing(study, monkeypatch):
    summary, said = study
    wanted = {record.number for record in contenders(summary.records, "moe_mamba")}
    assert summary.best.number in wanted
    assert any(one.preset == "moe_mamba" for one in summary.records if one.number in wanted)
    assert {one.number for one in summary.records if one.verdict} == wanted
    assert all(set(one.verdict) == VERDICT for one in summary.records if one.verdict)
    assert any(line.startswith(f"for the verdict, {len(wanted)} architectures, ") for line in said)
    page = summary.report.read_text()
    assert "by 4 further seeds that chose nothing" in page
    monkeypatch.setattr("hybridnas.analysis.bootstrap.LEAST_DOCUMENTS", 3)  # the corpus has four to test on
    found = verdict(
        summary.records, "moe_mamba", against=read_reference_study(summary.folder),
        documents=study_documents(summary.folder),
    )  # fmt: skip
    assert found.part == "test"
    assert found.others[-1].name == "the best of demo-random"
    assert {one.gap.seeds for one in found.others} == {4}
    assert all(one.gap.documents > 0 for one in found.others)


def test_the_confirmed_winner_is_exported_and_stands_in_the_leaderboard(study):
    summary, _ = study
    best = min((one for one in summary.records if one.confirmed), key=lambda r: statistics.fmean(r.confirmed.values()))
    assert summary.best.number == best.number
    assert hybridnas.load(summary.exported).arch.fingerprint() == best.fingerprint
    with (summary.folder / "leaderboard.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if int(row["trial"]) == best.number)
    assert float(row["confirmed_mean"]) == pytest.approx(statistics.fmean(best.confirmed.values()))
    assert row["confirmed_seeds"] == "2"
    assert float(row["confirmed_test_mean"]) == pytest.approx(statistics.fmean(best.confirmed_test.values()))


def test_a_random_search_of_equal_cost_is_the_reference_study(study):
    summary, said = study
    found = read_reference_study(summary.folder)
    assert found.study == "demo-random"
    theirs, _ = load_records(summary.folder.parent / "demo-random")
    ours = trained_tokens(summary.records)
    full = summary.best.tokens
    assert ours <= found.tokens == trained_tokens(theirs) <= ours + 2 * full
    drawn = [one for one in theirs if one.preset is None and one.state == "COMPLETE"]
    assert found.record.valid_loss == min(one.valid_loss for one in drawn)
    assert set(found.confirmed) == set(found.confirmed_test) == {"1", "2"}
    assert set(found.verdict) == set(found.verdict_test) == VERDICT
    assert found.steps[-1][1] == min(one.valid_loss for one in theirs if one.state == "COMPLETE")
    assert any("searching at random, too" in line for line in said)


def test_a_reference_that_is_one_of_ours_takes_its_further_trainings_over(tmp_path):
    own = TrialRecord(number=3, state="COMPLETE", pattern="MA", fingerprint="f", seed=0, lr=0.01)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run_folder = ours / "trials/0003/confirm/seed1"
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    folder = theirs / "trials/0007"
    folder.mkdir(parents=True)
    reference._take_over(ours, [dataclasses.replace(own, lr=0.02)], own, folder)
    assert list(folder.iterdir()) == []  # at another rate it is another training
    reference._take_over(ours, [own], own, folder)
    assert [path.name for path in folder.rglob("*")] == ["confirm", "seed1", "run.json"]


def test_confirming_again_trains_nothing(study, tiny, monkeypatch):
    summary, _ = study
    before = {path: path.stat().st_mtime_ns for path in summary.folder.glob("trials/*/confirm/*/metrics.jsonl")}
    assert len(before) == 8 + sum(len(one.verdict) for one in summary.records)
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
    further = sum(len(one.verdict) for one in second.records)
    assert len(calls) == 3 + 6 + further
    assert sum(len(one.confirmed) for one in second.records) == 8
    assert further == 4 * len(contenders(second.records, "moe_mamba"))


def test_a_study_of_another_budget_is_no_reference_study(study, tiny):
    summary, _ = study
    other = [*tiny, BASELINES, "n_trials=3", "against=demo", "study=other", "budget.lr=0.01"]
    with pytest.raises(StudyError, match="study 'demo' has another budget than this one, so their results cannot be"):
        run(summary.folder.parent, other)
    with pytest.raises(StudyError, match=r"no study in .*absent"):
        run(summary.folder.parent, [*tiny, BASELINES, "n_trials=2", "against=absent", "study=third"])


def test_what_is_confirmed_is_judged_at_its_own_best_rate(tmp_path, tiny):
    settings = ["study=demo", "n_trials=2", "confirm=on", "confirm_top=1", "confirm_seeds=2", "confirm_rates=own"]
    settings += ["space.baselines=[mamba]", "budget.lr=0.0001"]  # so low that three times as much is better
    summary = run(tmp_path, [*tiny, *settings])
    sure = [one for one in summary.records if one.confirmed]
    assert len(sure) == 2
    for one in sure:
        rates = {rate: score for rate, score, _ in one.own_rates}
        assert rates[0.0001] == one.valid_loss
        assert one.own_lr == min(rates, key=rates.get) > 0.0001
        for seed in one.confirmed:
            ran = json.loads((summary.folder / f"trials/{one.number:04d}/confirm/seed{seed}/run.json").read_text())
            assert ran["train"]["lr"] == one.own_lr
    assert "Each at its own best learning rate" in summary.report.read_text()


def test_one_more_seed_chooses_who_of_the_best_is_confirmed(tmp_path, tiny):
    settings = ["study=demo", "n_trials=6", "pruner=none", "confirm=on", "confirm_top=1", "confirm_screen=3"]
    settings += ["confirm_seeds=2", "confirm_rates=shared", "space.baselines=[mamba]"]
    said = []
    summary = run(tmp_path, [*tiny, *settings], said.append)
    drawn = sorted((one for one in summary.records if one.preset is None), key=lambda one: one.valid_loss)
    assert [set(one.screened) for one in drawn] == [{"500"}] * 3 + [set()] * (len(drawn) - 3)
    best = min(drawn[:3], key=lambda one: one.valid_loss + one.screened["500"])
    assert [one for one in drawn if one.confirmed] == [best]
    ran = json.loads((summary.folder / f"trials/{best.number:04d}/confirm/seed500/run.json").read_text())
    assert (ran["train"]["seed"], ran["status"]) == (500, "completed")
    assert any(line.startswith("one more seed for 3 architectures, 3 trainings") for line in said)
    assert "the best of 3 by the mean of two seeds" in summary.report.read_text()
    again = run(tmp_path, [*tiny, *settings])
    assert [one.screened for one in again.records] == [one.screened for one in summary.records]


def test_several_processes_confirm_as_one_does(study, tiny, tmp_path):
    summary, _ = study
    said = []
    again = run(tmp_path, [*tiny, BASELINES, *CONFIRM, "confirm_workers=2"], said.append)

    def found(records):
        fields = ("own_lr", "own_rates", "confirmed", "confirmed_test", "verdict", "verdict_test", "verdict_repeats")
        return {one.number: [getattr(one, name) for name in fields] for one in records}

    assert found(again.records) == found(summary.records)
    assert sum("confirming trial" in line for line in said) == 8
    assert not list(again.folder.glob("**/confirm-*.lock"))
