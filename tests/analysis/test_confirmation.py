"""Intervals over fresh seeds: pairs, the winner that fresh seeds decide, and the direction of accuracy."""

import dataclasses
import math
import statistics

import pytest

from hybridnas.analysis.confirmation import confirmed_scores, confirmed_winner, paired, summaries
from hybridnas.analysis.ranking import winner
from hybridnas.study.records import TrialRecord


def record(number, loss, **fields):
    fields.setdefault("objectives", {"val_loss": loss})
    return TrialRecord(number=number, state="COMPLETE", valid_loss=loss, **fields)


def test_the_interval_is_that_of_a_paired_t_test_computed_by_hand():
    a, b = {"1": 1.0, "2": 1.2, "3": 1.1}, {"1": 1.3, "2": 1.4, "3": 1.45}
    found = paired(a, b)
    gaps = [-0.3, -0.2, -0.35]
    assert found.n == 3
    assert found.mean == pytest.approx(statistics.fmean(gaps))
    assert found.half == pytest.approx(4.302652729911275 * statistics.stdev(gaps) / math.sqrt(3))
    assert found.clear
    assert found.sentence("x", "y").startswith(
        "x is better than y: -0.2833 ± 0.1897 nats per token (95% interval over 3"
    )
    assert paired(b, a).sentence("y", "x").startswith("y is worse than x: +0.2833")


def test_a_difference_inside_the_noise_has_an_interval_with_zero_in_it():
    found = paired({"1": 1.0, "2": 1.5}, {"1": 1.1, "2": 1.3})
    assert not found.clear
    assert found.sentence("x", "y").startswith("the difference between x and y is inside the noise: +0.0500 ± ")
    alone = paired({"1": 1.0, "2": None}, {"1": 1.1, "2": 1.3})
    assert (alone.n, alone.half) == (1, None)
    assert "too few for an interval" in alone.sentence("x", "y")


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
    assert paired(confirmed_scores(better), confirmed_scores(worse)).mean == pytest.approx(-0.1)
