"""Scaling laws fitted to losses whose law is known: exponents, intervals, crossings, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hybridnas.analysis.scaling_law import Law, Point, crossings, difference, fit_law, too_few

TRUE = Law(E=1.2, A=1.0, a=0.35, B=1.0, b=0.3, n_unit=1e4, d_unit=2e5)
SIZES, SEEDS, PER_PARAM = (4_000, 8_000, 16_000, 32_000, 64_000), 2, (5, 10, 20, 40, 80)


def losses(law, rng=None, run_noise=0.0, point_noise=0.0, sizes=SIZES):
    points = []
    for n in sizes:
        for seed in range(SEEDS):
            shared = rng.normal(0, run_noise) if rng else 0.0
            for ratio in PER_PARAM:
                own = rng.normal(0, point_noise) if rng else 0.0
                points.append(Point(n, ratio * n, law.loss(n, ratio * n) * math.exp(shared + own), (n, seed)))
    return points


def test_without_noise_the_fit_is_the_law():
    fit = fit_law(losses(TRUE), resamples=20)
    for name in ("E", "a", "b"):
        assert getattr(fit.law, name) == pytest.approx(getattr(TRUE, name), rel=0.02)
    assert fit.law.loss(320_000, 25_600_000) == pytest.approx(TRUE.loss(320_000, 25_600_000), abs=1e-3)
    assert fit.deviation < 1e-4


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, far = np.random.default_rng(0), (200_000, 16_000_000)
    held = {"loss": 0, "a": 0, "b": 0}
    for number in range(16):
        fit = fit_law(losses(TRUE, rng, run_noise=0.003, point_noise=0.001), resamples=40, seed=number)
        for name, found, true in (
            ("loss", fit.predict(*far), TRUE.loss(*far)),
            ("a", fit.coefficient("a"), TRUE.a),
            ("b", fit.coefficient("b"), TRUE.b),
        ):
            assert found.low <= found.high
            held[name] += found.low <= true <= found.high
    assert all(count >= 11 for count in held.values()), held


def test_a_fit_does_not_depend_on_the_order_of_its_points():
    points = losses(TRUE, np.random.default_rng(1), 0.003, 0.001)
    one, other = fit_law(points, resamples=20), fit_law(points[::-1], resamples=20)
    assert one.predict(1e6, 1e7).value == pytest.approx(other.predict(1e6, 1e7).value, rel=1e-4)


def test_a_crossing_is_found_where_the_laws_cross():
    # Equal data terms, so they cross where 1.0 / (N / 1e4)^0.35 + 1.2 = 0.7 / (N / 1e4)^0.35 + 1.35: (N / 1e4)^0.35 = 2
    steep, flat = TRUE, Law(E=1.35, A=0.7, a=0.35, B=1.0, b=0.3, n_unit=1e4, d_unit=2e5)
    where = 1e4 * 2 ** (1 / 0.35)
    fits = [fit_law(losses(law), resamples=20) for law in (steep, flat)]
    found = crossings(*fits, low=4_000, high=640_000, tokens_per_param=20)
    assert found.params == pytest.approx((where,), rel=0.05)
    assert found.share == 1.0
    assert crossings(*fits, low=4_000, high=0.7 * where, tokens_per_param=20).params == ()
    assert difference(*fits, 10 * where, 200 * where).value < 0 < difference(*fits, where / 10, 2 * where).value


def test_noise_that_two_architectures_share_leaves_their_difference_narrow():
    rng = np.random.default_rng(2)
    noise = {(n, seed): rng.normal(0, 0.01) for n in SIZES for seed in range(SEEDS)}
    fits = []
    for lower in (1.0, 0.97):
        points = [p._replace(loss=lower * p.loss * math.exp(noise[p.run])) for p in losses(TRUE)]
        fits.append(fit_law(points, resamples=60))
    gap, alone = difference(*fits, 64_000, 5_120_000), fits[0].predict(64_000, 5_120_000)
    assert gap.high - gap.low < 0.2 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("points", "missing"),
    [
        (losses(TRUE, sizes=SIZES[:2]), "sizes"),
        ([p for p in losses(TRUE) if p.tokens == 5 * p.params], "several token counts"),
        (losses(TRUE)[:1], "sizes"),
    ],
)
def test_too_few_points_are_refused_in_words(points, missing):
    assert missing in too_few(points)
    with pytest.raises(ValueError, match=missing):
        fit_law(points)


def test_few_runs_give_a_fit_without_intervals():
    points = [p for p in losses(TRUE, sizes=SIZES[:3]) if p.run[1] == 0]
    fit = fit_law(points)
    assert fit.resampled == ()
    assert math.isnan(fit.predict(1e5, 1e6).low)
