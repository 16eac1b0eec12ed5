"""Own learning rates: a race finds the best rate of a grid, relatives narrow it, and its cost is counted."""

import math

import pytest

from hybridnas.search.config import ADDED, Budget
from hybridnas.search.rates import FACTOR, MOST, Tried, losers_tokens, race, start
from hybridnas.study.records import COMPLETE, TrialRecord


def parabola(best):
    """A loss whose minimum over log rates lies at ``best``; remembers what was asked for."""
    asked = []

    def train(lr):
        asked.append(lr)
        return Tried(lr, math.log(lr / best) ** 2, 100)

    return train, asked


@pytest.mark.parametrize("steps", [-3, -2, -1, 0, 1, 2, 3])
def test_a_race_ends_at_the_best_rate_of_the_grid(steps):
    train, asked = parabola(0.01 * FACTOR**steps)
    tried = race(train, 0.01)
    assert tried[0].lr == pytest.approx(0.01 * FACTOR**steps)
    assert len(asked) == len(set(asked)) == len(tried) == 3 + abs(steps)
    assert losers_tokens(tried) == 100 * (len(tried) - 1)


def test_a_race_that_would_go_on_for_ever_ends():
    train, asked = parabola(1e9)
    assert len(race(train, 0.01)) == len(asked) == MOST


def test_where_high_rates_diverge_lower_ones_are_tried():
    tried = race(lambda lr: Tried(lr, 1.0 if lr < 0.001 else math.inf, 50), 0.01)
    assert tried[0].lr < 0.001
    assert math.isinf(race(lambda lr: Tried(lr, math.inf, 0), 0.01)[0].loss)


def record(number, pattern, lr=None):
    return TrialRecord(number=number, state=COMPLETE, pattern=pattern, lr=lr)


def begin(*earlier, pattern="MEFE"):
    return start({r.number: r for r in earlier}, record(99, pattern), 0.5)


def test_a_race_starts_where_relatives_ended():
    assert begin() == (0.5, False)
    assert begin(record(1, "AAFF", 0.1)) == (0.1, False)
    assert begin(record(1, "AAFF", 0.1), record(2, "(ME)(FE)", 0.3)) == (0.3, False)  # the same letters count alone
    assert begin(record(1, "EMEF", 0.1), record(2, "FEEM", 0.1), record(3, "EEFM", 0.1)) == (0.1, True)
    assert begin(record(1, "EMEF", 0.1), record(2, "FEEM", 0.3), record(3, "EEFM", 0.1)) == (0.1, False)
    assert begin(record(100, "EMEF", 0.1)) == (0.5, False)  # only what was there before: a resumed trial starts alike


def test_a_scaled_rate_and_the_options_of_the_optimizer_reach_the_training():
    options = {"base_width": 24, "embedding_lr": 2.0, "optimizer": "muon", "z_loss": 1e-4}
    config = Budget(d_model=48, depth=4, rate="scaled", **options).train_config(10_000, seed=0)
    assert config.rate_scaling == "mup"
    assert {name: getattr(config, name) for name in options} == options


def test_options_at_their_defaults_leave_a_studys_identity_as_it_was():
    assert not set(ADDED) & set(Budget(d_model=48, depth=4).identity())
    assert Budget(d_model=48, depth=4).train_config(10_000, seed=0).rate_scaling == "none"
