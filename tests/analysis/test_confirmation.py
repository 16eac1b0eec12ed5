"""Fresh seeds: the winner that they decide, and the direction of accuracy."""

import dataclasses

import pytest

from hybridnas.analysis.bootstrap import difference
from hybridnas.analysis.confirmation import confirmed_scores, confirmed_winner, summaries
from hybridnas.analysis.ranking import winner
from hybridnas.study.records import TrialRecord


def record(number, loss, **fields):
    fields.setdefault("objectives", {"val_loss": loss})
    return TrialRecord(number=number, state="COMPLETE", valid_loss=loss, **fields)


def test_other_seeds_choose_the_winner_and_a_failed_one_cannot_win():
    lucky = record(1, 1.0, confirmed={"1": 1.6, "2": 1.5})
    solid = record(2, 1.1, confirmed={"1": 1.2, "2": 1.3})
    broken = record(3, 0.9, confirmed={"1": 0.8, "2": None})
    unasked = record(4, 0.5)
    assert winner([lucky, solid, broken, unasked]).number == 2
    assert winner([lucky, dataclasses.replace(solid, confirmed={"1": 1.2})]).number == 1  # not the same seeds yet
    assert confirmed_winner([dataclasses.replace(lucky, confirmed={"1": 1.6})]) is None
    found = summaries([lucky, solid, broken, unasked])
    assert [one.record.number for one in found] == [2, 1, 3]
    assert found[0].error == pytest.approx(0.05)
    assert found[2].value is None


def test_accuracy_is_confirmed_in_its_own_direction():
    better = record(1, 2.0, objectives={"accuracy": 0.5}, confirmed={"1": 0.6, "2": 0.7})
    worse = record(2, 1.0, objectives={"accuracy": 0.6}, confirmed={"1": 0.5, "2": 0.6})
    assert winner([better, worse]).number == 1
    assert summaries([better])[0].value == pytest.approx(0.65)
    assert difference(confirmed_scores(better), confirmed_scores(worse)).mean == pytest.approx(-0.1)
