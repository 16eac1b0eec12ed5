"""Intervals of one figure: against SciPy, and how often they hold the truth."""

import numpy as np
import pytest
from scipy.stats import binomtest, pearsonr

from hybridnas.analysis.intervals import correlation_interval, explained_interval, share_interval


@pytest.mark.parametrize(("right", "count"), [(0, 10), (7, 10), (10, 10), (81, 263), (900, 1000)])
def test_the_interval_of_a_share_is_wilsons(right, count):
    wanted = binomtest(right, count).proportion_ci(method="wilson")
    assert share_interval(right, count) == pytest.approx((wanted.low, wanted.high))


def test_the_interval_of_a_correlation_is_fishers():
    draw = np.random.default_rng(0)
    one = draw.normal(size=40)
    found = pearsonr(one, one + draw.normal(size=40))
    wanted = found.confidence_interval()
    assert correlation_interval(float(found.statistic), 40) == pytest.approx((wanted.low, wanted.high))
    assert correlation_interval(0.5, 3) == (-1.0, 1.0)
    assert correlation_interval(1.0, 30) == (1.0, 1.0)


def test_the_interval_of_what_is_explained_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(60):
        draw = np.random.default_rng(seed)
        true = draw.normal(size=200)
        low, high = explained_interval(true + 0.5 * draw.normal(size=200), true)
        held += low <= 0.75 <= high
    assert held >= 50  # 57 of 60 are wanted
    assert explained_interval([1.0, 2.0], [3.0, 3.0])[1] == 1.0
