"""What a ladder says of losses that are known."""

from __future__ import annotations

import math

import pytest

from hybridnas.analysis.scaling_law import Law
from hybridnas.errors import ConfigError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.rows import Row
from hybridnas.ladders.verdict import judge

BASE = 4_000
STEEP = Law(E=1.2, A=1.0, a=0.35, B=1.0, b=0.3, n_unit=1e4, d_unit=2e5)
FLAT = Law(E=1.35, A=0.7, a=0.35, B=1.0, b=0.3, n_unit=1e4, d_unit=2e5)  # crosses STEEP at 72,450 parameters
SETTINGS = {"patterns": ["M", "A"], "sizes": [1, 2, 4, 8, 16, 32], "tokens": [10, 20, 40], "resamples": 20}


def rows(laws, sizes, seeds=2, ratios=(10, 20, 40)):
    found = []
    for name, law in laws.items():
        for size in sizes:
            for seed in range(seeds):
                for ratio in ratios:
                    n = round(BASE * size)
                    loss = law.loss(n, ratio * n) + 0.001 * (-1) ** seed
                    found.append(
                        Row(
                            model=name, pattern=name, fingerprint=name, size=size, active_params=n, params=n,
                            d_model=16, depth=1, seed=seed, lr=0.01, rate=1.0, batch_size=4, tokens=ratio * n,
                            tokens_per_param=ratio, flops=6.0 * n * ratio * n, valid_loss=loss, bits_per_byte=None,
                            test_loss=None, folder=f"{name}/{size}-{seed}",
                        )
                    )  # fmt: skip
    return found


def test_an_order_that_changes_is_said_with_the_place_where_the_fits_cross():
    config = LadderConfig(**SETTINGS)
    verdict = judge(rows({"steep": STEEP, "flat": FLAT}, config.sizes), config, BASE)
    (pair,) = verdict.pairs
    assert (pair.first, pair.second, pair.held) == ("steep", "flat", False)
    assert [gap.size for gap in pair.gaps if gap.mean < 0] == [32]
    assert pair.crossing is not None
    assert pair.crossing.params == pytest.approx((1e4 * 2 ** (1 / 0.35),), rel=0.1)
    assert [times for times, _ in pair.ahead] == [10, 100]
    assert all(gap.value < 0 for _, gap in pair.ahead)
    assert "change places" in pair.sentence()


def test_held_out_sizes_are_predicted_by_a_fit_that_has_not_seen_them():
    config = LadderConfig(**SETTINGS, hold_out=2)
    seen = rows({"steep": STEEP}, config.sizes[:-2])
    shifted = Law(E=1.5, A=1.0, a=0.35, B=1.0, b=0.3, n_unit=1e4, d_unit=2e5)
    (model,) = judge(seen + rows({"steep": shifted}, config.sizes[-2:]), config, BASE).models
    assert {one.size for one in model.held_out} == {16, 32}
    for one in model.held_out:  # the fit has not seen that the larger ones are 0.3 nats worse
        assert one.error == pytest.approx(-0.3, abs=0.02)
        assert one.inside is False


def test_the_predictions_are_at_ten_and_a_hundred_times_the_compute_of_the_largest():
    config = LadderConfig(**SETTINGS)
    (model,) = judge(rows({"steep": STEEP}, config.sizes), config, BASE).models
    top = BASE * 32
    for times, n, d, loss in model.ahead:
        assert n * d == pytest.approx(times * top * 40 * top)
        assert d / n == pytest.approx(40)
        assert loss.value == pytest.approx(STEEP.loss(n, d), abs=0.01)


def test_too_few_sizes_give_the_order_and_no_law():
    config = LadderConfig(**{**SETTINGS, "sizes": [1, 2]})
    verdict = judge(rows({"steep": STEEP, "flat": FLAT}, config.sizes, seeds=1), config, BASE)
    assert [model.fit for model in verdict.models] == [None, None]
    assert all("3 sizes" in model.why for model in verdict.models)
    (pair,) = verdict.pairs
    assert (pair.first, pair.held, pair.crossing, pair.ahead) == ("flat", True, None, ())
    assert "no interval" in pair.sentence()


def test_a_ladder_that_cannot_test_its_extrapolation_says_why():
    config = LadderConfig(**{**SETTINGS, "sizes": [1, 2, 4]})
    (model,) = judge(rows({"steep": STEEP}, config.sizes), config, BASE).models
    assert model.fit is not None
    assert model.held_out == ()
    assert "3 sizes, got 2" in model.why_untested


def test_nothing_finished_says_so():
    assert judge([], LadderConfig(**SETTINGS), BASE).notes


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"patterns": ["M"], "sizes": [2, 1]}, "ladder.sizes"),
        ({"patterns": ["M"], "tokens": []}, "ladder.tokens"),
        ({"patterns": ["M"], "rates": []}, "ladder.rates"),
        ({"patterns": ["M"], "rates": [1, 1.0]}, "ladder.rates"),
        ({"patterns": ["M"], "warmup": 9.0}, "ladder.warmup"),
        ({"study": "x", "budget": {"name": "smoke"}}, "ladder.budget"),
    ],
)
def test_settings_that_make_no_ladder_are_refused(settings, field):
    with pytest.raises(ConfigError) as caught:
        LadderConfig(**settings)
    assert caught.value.field == field


def test_gaps_are_paired_by_seed():
    config = LadderConfig(**SETTINGS)
    (pair,) = judge(rows({"steep": STEEP, "flat": FLAT}, config.sizes), config, BASE).pairs
    for gap in pair.gaps:  # both have the same noise in each seed
        assert gap.half == pytest.approx(0.0, abs=1e-9)
        n = BASE * gap.size
        assert math.isclose(gap.mean, STEEP.loss(n, 40 * n) - FLAT.loss(n, 40 * n), abs_tol=1e-9)
