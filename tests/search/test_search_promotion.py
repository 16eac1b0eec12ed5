"""A search that pauses: candidates wait at rungs, are taken up where they stopped, and stay one candidate."""

import csv
import dataclasses
from itertools import pairwise

import pytest

from hybridnas.analysis.ranking import rung_scores
from hybridnas.cli.compose import compose
from hybridnas.cli.search import search_config
from hybridnas.report.callbacks import ConsoleLines
from hybridnas.search import training
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.search.pruning.halving import best_of
from hybridnas.search.replay import replay
from hybridnas.search.storage.folder_store import FolderStore
from hybridnas.studies import Study
from hybridnas.study.records import TrialRecord, load_records, trained_tokens

HALVING = [
    "pruner=halving",
    "sampler=random",
    "budget.tokens_per_active_param=1",
    "budget.rungs=3",
    "study=demo",
    "seed=1",
]


def run(folder, settings, news=None):
    config = compose("search", ["budget=smoke", "study=demo", f"runs={folder}", *settings])
    return Study.of(search_config(config)).run([ConsoleLines(news)] if news else [])


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny):
    """A search of twelve without baselines, two at a time to the next rung."""
    said = []
    folder = tmp_path_factory.mktemp("runs")
    return run(folder, [*tiny, *HALVING, "space.baselines=[]", "n_trials=12"], said.append), said


def rungs_of(summary):
    return sorted({int(tokens) for record in summary.records for tokens, _ in record.rungs})


def trained(summary):
    return [record for record in summary.records if record.state in ("COMPLETE", "PRUNED")]


def test_every_rung_has_sent_its_best_on_and_nobody_promising_is_left(study):
    summary, _ = study
    rungs = rungs_of(summary)
    assert len(rungs) == 3
    scores = rung_scores(summary.records, rungs, {})
    assert len(scores[rungs[0]]) == 12
    for rung, above in pairwise(rungs):
        assert set(best_of(scores[rung], 2)) <= set(scores[above])
        assert len(scores[above]) < len(scores[rung])
    assert summary.ended == "completed"


def test_candidates_that_went_on_keep_one_number_one_record_and_one_row(study):
    summary, said = study
    again = [record for record in summary.records if len(record.legs) >= 2]
    assert again, "the seed makes at least one promotion"
    numbers = [record.number for record in summary.records]
    assert numbers == list(range(len(numbers)))
    with (summary.folder / "leaderboard.csv").open() as file:
        assert sorted(int(row["trial"]) for row in csv.DictReader(file)) == numbers
    folders = sorted(int(path.name) for path in (summary.folder / "trials").iterdir())
    assert set(folders) <= set(numbers)
    for record in again:
        assert any(f"trial {record.number} is among the best at" in line for line in said)


def test_tokens_are_counted_once(study):
    summary, _ = study
    for record in trained(summary):
        assert sum(tokens for _, tokens in record.legs) == record.tokens == record.rungs[-1][0]
    assert trained_tokens(summary.records) == sum(record.tokens for record in trained(summary))


def test_a_promoted_candidate_equals_one_that_never_stopped(study):
    summary, _ = study
    record = next(record for record in summary.records if record.state == "COMPLETE" and len(record.legs) > 1)
    assert replay(summary.folder, record.number).identical


def test_paused_ones_say_so(study):
    summary, _ = study
    paused = [record for record in summary.records if record.state == "PRUNED"]
    assert paused
    for record in paused:
        assert record.reason == (
            f"paused at {record.tokens:,} of {rungs_of(summary)[-1]:,} tokens: not among the best 1/2 there"
        )


def test_at_the_end_no_hopeless_checkpoint_is_left(study):
    summary, _ = study
    left = {int(path.parent.name) for path in (summary.folder / "trials").glob("*/checkpoint.safetensors")}
    states = {record.number: record.state for record in summary.records}
    assert len(left) == training.KEPT_CHECKPOINTS
    assert {states[number] for number in left} == {"COMPLETE"}


def test_checkpoints_are_looked_for_once_for_each_state_of_a_trial(tmp_path):
    budget = Budget(d_model=8, depth=1, confirm_top=1)
    config = SearchConfig(space={"name": "s"}, data={"kind": "stdlib"}, budget=budget)
    trainer = training.CellTrainer(tmp_path, config, None, 1)
    history = History(("val_loss",), (1,))
    plan = Plan(candidates=None, rungs=(1,), reduction=2, n_trials=9, pruner="none")
    for number in range(6):
        history.put(TrialRecord(number=number, state="COMPLETE", valid_loss=float(number)))
    kept = [trainer.folder(number) / "checkpoint.safetensors" for number in range(6)]

    def left():
        for path in kept:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        trainer.tidy(plan, history)
        return [number for number, path in enumerate(kept) if path.exists()]

    assert left() == [0, 1, 2]
    assert left() == [0, 1, 2, 3, 4, 5]  # nothing trains in a folder whose record stays as it is
    history.put(TrialRecord(number=4, state="COMPLETE", valid_loss=4.5))
    assert left() == [0, 1, 2, 3, 5]


def test_a_longer_search_takes_up_paused_candidates_and_says_when_it_must_start_anew(study, tiny):
    summary, _ = study
    before = {record.number: record for record in load_records(summary.folder)[0]}
    said = []
    longer = run(summary.folder.parent, [*tiny, *HALVING, "space.baselines=[]", "n_trials=20"], said.append)
    grown = [record for record in longer.records if len(record.legs) > len(before.get(record.number, record).legs)]
    assert grown, "more arrivals promote somebody"
    for record in grown:
        assert f"trial {record.number}: its checkpoint is gone, so it is trained again from nothing" in said
        assert sum(tokens for _, tokens in record.legs) > record.tokens  # what was trained twice is counted twice
        assert record.points()[: len(before[record.number].points())] == before[record.number].points()


def test_baselines_run_to_the_end_and_count_in_the_rungs(tmp_path, tiny):
    summary = run(tmp_path, [*tiny, *HALVING, "n_trials=7"])
    assert [record.state for record in summary.records[:5]] == ["COMPLETE"] * 5
    assert all(len(record.legs) == 1 for record in summary.records[:5])


def test_a_search_too_short_to_promote_anybody_still_ends_with_a_winner(tmp_path, tiny):
    settings = [*tiny, *HALVING, "budget.reduction=3", "space.baselines=[]", "n_trials=2"]
    summary = run(tmp_path, settings)
    assert sorted(record.state for record in summary.records) == ["COMPLETE", "PRUNED"]
    first = [record.rungs[0][1] for record in summary.records]
    assert summary.best.rungs[0][1] == min(first)
    assert summary.exported is not None


def test_a_promotion_that_was_cut_off_goes_on_and_nothing_is_trained_twice(tmp_path, tiny, monkeypatch):
    real, cut = training.CellTrainer.train, []

    def die(self, record, arch, on_eval):
        if record.rungs and not cut:
            cut.append(record.number)
            raise KeyboardInterrupt
        return real(self, record, arch, on_eval)

    settings = [*tiny, *HALVING, "space.baselines=[]", "n_trials=8"]
    monkeypatch.setattr(training.CellTrainer, "train", die)
    assert run(tmp_path, settings).ended == "interrupted"
    (number,) = cut
    kept = {record.number: record for record in load_records(tmp_path / "demo", running=True)[0]}
    assert (kept[number].state, bool(kept[number].rungs)) == ("RUNNING", True)
    said = []
    summary = run(tmp_path, settings, said.append)
    assert f"trial {number} was interrupted; going on from its checkpoint" in said
    assert summary.ended == "completed"
    assert trained_tokens(summary.records) == sum(record.tokens for record in trained(summary))
    assert {record.state for record in summary.records} <= {"COMPLETE", "PRUNED", "INFEASIBLE"}


def test_a_promotion_that_was_recorded_is_not_run_again(tmp_path, tiny, monkeypatch):
    settings = [*tiny, *HALVING, "space.baselines=[]", "n_trials=8"]
    real = FolderStore.release

    def die(self, number):
        real(self, number)
        if len(self._records.get(number).legs) >= 1 and self._records[number].state == "RUNNING":
            raise KeyboardInterrupt

    monkeypatch.setattr(FolderStore, "release", die)
    run(tmp_path, settings)
    monkeypatch.undo()
    before = {r.number: r.legs for r in load_records(tmp_path / "demo")[0] if len(r.legs) > 1}
    assert before
    summary = run(tmp_path, settings)
    after = {record.number: record.legs for record in summary.records}
    assert {number: after[number][:2] for number in before} == before


def test_two_workers_cannot_both_take_a_promotion(tmp_path):
    one, two = FolderStore(tmp_path), FolderStore(tmp_path, worker=1)
    paused = TrialRecord(number=0, state="PRUNED", tokens=10, rungs=[[10, 1.0]])
    one.save(paused)
    for store in (one, two):
        assert [record.number for record in store.changes()] == [0]
    going_on = dataclasses.replace(paused, state="RUNNING")
    assert one.begin(going_on)
    assert not two.begin(going_on)
    one.save(dataclasses.replace(paused, state="COMPLETE", tokens=20))
    one.release(0)
    assert not two.begin(going_on)  # it looked before the end was written
    assert [record.state for record in two.changes()] == ["COMPLETE"]


def test_every_rung_of_wsd_scores_a_finished_model_and_its_branches_are_paid_for(tmp_path, tiny):
    settings = [*tiny, *HALVING, "budget.schedule=wsd", "budget.tokens_per_active_param=4", "budget.decay_fraction=0.3"]
    summary = run(tmp_path, [*settings, "space.baselines=[]", "n_trials=6"])
    rungs = rungs_of(summary)
    for record in trained(summary):
        at = {entry["tokens"]: entry for entry in record.curve}
        assert all(at[tokens]["annealed"] == 1 for tokens, _ in record.rungs)
        assert sum(tokens for _, tokens in record.legs) == at[record.tokens]["trained_tokens"]
    again = next(record for record in summary.records if record.state == "COMPLETE" and len(record.legs) > 1)
    assert again.curve[-1]["trained_tokens"] > rungs[-1]  # branches cost more than the tokens of the last model
    assert replay(summary.folder, again.number).identical


def test_every_trial_of_a_tuned_search_goes_on_with_the_best_rate_of_its_race(tmp_path, tiny):
    settings = [*tiny, *HALVING, "budget.schedule=wsd", "budget.rate=tuned", "budget.tokens_per_active_param=4"]
    summary = run(tmp_path, [*settings, "space.baselines=[]", "n_trials=4"])
    raced = [record for record in trained(summary) if record.rates]
    assert raced
    for record in raced:
        assert record.lr == record.rates[0][0]
        assert record.rates[0][1] == record.rungs[0][1] == min(loss for _, loss, _ in record.rates if loss is not None)
        own = record.curve[-1]["trained_tokens"]
        assert sum(tokens for _, tokens in record.legs) == own + sum(tokens for _, _, tokens in record.rates[1:])
        assert not (summary.folder / "trials" / f"{record.number:04d}" / training.RATES).exists()
    assert replay(summary.folder, raced[0].number).identical
