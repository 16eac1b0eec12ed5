"""Rank correlation between early and full scores: by hand, from a study's trials, and stated with its n."""

import math

import pytest

from hybridnas.analysis.rung_correlation import agreements, caveat, rank_correlation, study_agreements
from hybridnas.study.records import TrialRecord


def test_the_correlations_are_those_of_the_textbook():
    full = [1.0, 2.0, 3.0, 4.0, 5.0]
    early = [2.0, 1.0, 3.0, 5.0, 4.0]  # squared rank differences: 1 + 1 + 0 + 1 + 1; two of ten pairs are reversed
    spearman, kendall = rank_correlation(early, full)
    assert spearman == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert kendall == pytest.approx((8 - 2) / 10)


def test_each_point_is_held_against_the_last_with_its_own_n():
    curves = [{100: float(i), 300: float(-i), 900: float(i)} for i in range(5)]
    curves += [{100: 9.0}, {100: 3.0, 900: math.inf}]  # stopped early; diverged
    first, second = agreements(curves)
    assert (first.tokens, first.full, first.n) == (100, 900, 5)
    assert (first.spearman, first.kendall) == pytest.approx((1.0, 1.0))
    assert (second.tokens, second.n) == (300, 5)
    assert (second.spearman, second.kendall) == pytest.approx((-1.0, -1.0))
    [only] = agreements(curves, (100, 900))
    assert only == first


def test_few_or_constant_scores_have_no_correlation():
    [few] = agreements([{1: float(i), 2: float(i)} for i in range(3)])
    assert (few.n, few.spearman, few.kendall) == (3, None, None)
    [constant] = agreements([{1: 0.5, 2: float(i)} for i in range(6)])
    assert (constant.n, constant.spearman, constant.kendall) == (6, None, None)
    assert agreements([]) == []


def record(number, state, early, full=None, fingerprint=None):
    rungs = [[100, early]] + ([[900, full]] if full is not None else [])
    return TrialRecord(number=number, state=state, rungs=rungs, fingerprint=fingerprint or f"f{number}")


def test_a_study_speaks_of_its_completed_trials_each_architecture_once():
    records = [record(i, "COMPLETE", float(i), float(i)) for i in range(4)]
    records.append(record(4, "PRUNED", 9.0))
    records.append(record(5, "DUPLICATE", 0.0, 9.0, fingerprint="f0"))
    [found] = study_agreements(records)
    assert (found.tokens, found.full, found.n, found.spearman) == (100, 900, 4, pytest.approx(1.0))
    assert study_agreements([]) == []


def test_the_words_say_who_is_left_out():
    found = study_agreements([record(i, "COMPLETE", float(i), float(i)) for i in range(4)])
    assert caveat(found) == "over the 4 trials that were trained to the end"
    assert "the 7 that were stopped early have no full score" in caveat(found, 7)
    assert caveat([]).startswith("fewer than 4 trials were trained to the end")
