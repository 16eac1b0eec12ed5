"""Simulated studies with a known answer: intervals hold it as often as they say, and false claims are as rare.

Few studies, with fixed seeds; tolerances are three standard errors of a share. ``bench coverage`` runs thousands.
"""

import math

import numpy as np
import pytest

from hybridnas.bench.suites.coverage import DESIGNS, WORLDS, effects_coverage, simulate

STUDIES = 150


def band(share, count):
    return 3 * math.sqrt(share * (1 - share) / count)


@pytest.mark.parametrize("world", WORLDS[:2], ids=lambda world: world.name)
def test_intervals_of_a_verdict_hold_the_truth_and_claims_are_rarely_false(world):
    found = [simulate(world, seed=seed) for seed in range(STUDIES)]
    covers = [one.covers for one in found if one.covers is not None]
    assert np.mean(covers) == pytest.approx(0.95, abs=band(0.95, len(covers)))
    assert np.mean([one.false for one in found]) <= 0.05 + band(0.05, STUDIES)
    one_seed = [one.one_covers for one in found if one.one_covers is not None]
    assert np.mean(one_seed) == pytest.approx(0.95, abs=band(0.95, len(one_seed)))
    says = np.mean([one.beats for one in found])
    assert (says > 0.2) == (world.effects > 0)  # a real difference is found, none is invented


def test_intervals_of_effects_hold_the_truth():
    found = effects_coverage(DESIGNS[1], 40, seed=3)
    assert found["positions"] == pytest.approx(0.95, abs=band(0.95, 40 * 16 / 4))  # effects of a fit depend on another
    assert found["letters"] == pytest.approx(0.95, abs=band(0.95, 40 * 4 / 2))
