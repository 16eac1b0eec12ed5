"""Ranks, fronts and scores at rungs over records: directions, several objectives, presets through their originals."""

import random

import pytest

from hybridnas.analysis.pareto import dominates, fronts, staircase
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


@pytest.mark.parametrize("coordinates", [1, 2, 3, 4])
def test_fronts_are_peeled_off_one_by_one_as_nsga_2_defines_them(coordinates):
    chance = random.Random(coordinates)
    for count in (0, 1, 2, 7, 40, 120):
        points = {
            number: tuple(chance.choice([0.5, float(chance.randint(0, 5))]) for _ in range(coordinates))
            for number in chance.sample(range(1000), count)
        }
        left, peeled = dict(points), []
        while left:
            peeled.append([key for key in left if not any(dominates(other, left[key]) for other in left.values())])
            left = {key: point for key, point in left.items() if key not in peeled[-1]}
        assert fronts(points) == peeled


def test_what_is_not_a_number_is_beaten_by_nothing_and_beats_nothing():
    assert fronts({0: (1.0, 1.0), 1: (2.0, float("nan")), 2: (2.0, 2.0)}) == [[0, 1], [2]]


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
