"""Tokens to reach a loss, and the best so far of a search, by hand-computed curves."""

import dataclasses

import pytest

from hybridnas.analysis.curves import best_so_far, tokens_to_reach
from hybridnas.study.records import TrialRecord


def record(number, loss, **fields):
    objectives = {"val_loss": loss}
    return TrialRecord(number=number, state="COMPLETE", valid_loss=loss, objectives=objectives, **fields)


def test_tokens_to_reach_a_loss_lie_on_the_line_between_two_points():
    curve = [(1, 1.0), (3, 1 / 3)]
    assert tokens_to_reach(curve, 0.5) == pytest.approx(2.5)
    assert tokens_to_reach(curve, 1 / 3) == 3
    assert tokens_to_reach(curve, 0.3) is None
    assert tokens_to_reach(curve, 2.0) == 1
    assert tokens_to_reach([], 1.0) is None


def test_the_first_time_counts_where_a_curve_rises_again():
    assert tokens_to_reach([(1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5)], 1.0) == 2


def test_the_best_so_far_counts_every_token_when_it_was_trained():
    records = [
        record(0, 3.0, legs=[[10.0, 100]]),
        dataclasses.replace(record(1, 2.5), state="PRUNED", legs=[[20.0, 30]]),
        record(2, 1.0, legs=[[30.0, 30], [50.0, 70]]),
        record(3, 2.0, legs=[[40.0, 100]]),
        record(4, 0.5, legs=[[5.0, 100]], preset="mamba"),  # every study begins with the presets
    ]
    assert best_so_far(records) == [(100.0, 3.0), (260.0, 2.0), (330.0, 1.0)]
