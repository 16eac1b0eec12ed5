"""Ranks, fronts and scores at rungs over records: directions, several objectives, presets through their originals."""

import pytest

from hybridnas.analysis.pareto import staircase
from hybridnas.analysis.ranking import front, preset_record, rows, rung_scores, winner
from hybridnas.study.records import TrialRecord


def record(number, state="COMPLETE", preset=None, duplicate_of=None, **values):
    return TrialRecord(number=number, state=state, preset=preset, duplicate_of=duplicate_of, objectives=values,
                       valid_loss=values.get("val_loss"))  # fmt: skip


def test_more_accuracy_is_better_in_leaderboard_and_winner():
    found = [record(0, accuracy=0.2), record(1, accuracy=0.6), record(2, accuracy=0.4)]
    assert winner(found).number == 1
    assert [row.record.number for row in rows(found)] == [1, 2, 0]
    assert rung_scores(
        [TrialRecord(number=1, state="PRUNED", objectives={"accuracy": 0.6}, curve=[{"tokens": 5, "accuracy": 0.6}])],
        (5, 9),
        {},
    ) == {5: {1: -0.6}, 9: {}}


def test_the_first_objective_decides_and_the_front_is_all_that_nobody_beats():
    found = [
        record(0, val_loss=2.0, state_bytes=10.0),
        record(1, val_loss=1.0, state_bytes=40.0),
        record(2, val_loss=1.5, state_bytes=40.0),
        record(3, "PRUNED", val_loss=0.1, state_bytes=1.0),
    ]
    assert winner(found).number == 1
    assert [one.number for one in front(found)] == [1, 0]
    assert [(row.record.number, row.front) for row in rows(found)] == [(1, True), (2, False), (0, True), (3, False)]


def test_a_baseline_that_repeats_a_trial_is_compared_with_through_it():
    records = [record(0, val_loss=1.5), record(1, "DUPLICATE", preset="mamba", duplicate_of=0), record(2, val_loss=1.4)]
    assert preset_record(records, "mamba") is records[0]
    assert rows(records, "mamba")[0].gap == pytest.approx(-0.1)


def test_the_front_keeps_what_none_beats():
    assert staircase([(3, 1), (1, 3), (2, 2), (2, 4), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]
