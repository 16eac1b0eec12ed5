"""Decision accuracy on truth sets that were simulated with a known answer."""

import dataclasses
import math
import random

import pytest

from hybridnas.analysis.decisions import (
    ANNEALED,
    COSINE,
    EXTRAPOLATED,
    HALVED,
    OWN,
    TRUNK,
    Policy,
    Rows,
    budget_words,
    choose,
    extrapolated,
    judge,
    policies,
    quality,
    step_share,
)
from hybridnas.bench.suites.decisions import measure, simulated
from hybridnas.errors import StudyError
from hybridnas.study.truth import CHOOSING, RATES, REPORTING


def policy(**changes):
    return Policy(**{"signal": ANNEALED, "size": 1000, "rate": OWN, "rung": 1.0, **changes})


def test_an_order_without_noise_decides_all_pairs_rightly_and_its_opposite_none():
    truth = [2 + 0.01 * i for i in range(20)]
    right, wrong = quality(truth, truth), quality([-loss for loss in truth], truth)
    assert (right.accuracy, right.accuracy_best_half, right.regret, right.spearman) == (1, 1, 0, pytest.approx(1))
    assert right.intervals["accuracy"] == (1, 1) and right.intervals["regret"] == (0, 0)
    assert (wrong.accuracy, wrong.accuracy_best_half, wrong.spearman) == (0, 0, pytest.approx(-1))
    assert wrong.regret == pytest.approx(0.19)


def test_pure_noise_decides_half_of_the_pairs_and_its_interval_holds_a_half():
    draws = random.Random(0)
    found = [quality([draws.random() for _ in range(24)], list(range(24)), draws=200, seed=i) for i in range(200)]
    assert sum(one.accuracy for one in found) / 200 == pytest.approx(0.5, abs=0.02)
    assert sum(one.accuracy_best_half for one in found) / 200 == pytest.approx(0.5, abs=0.03)
    covered = sum(one.intervals["accuracy"][0] <= 0.5 <= one.intervals["accuracy"][1] for one in found)
    assert covered >= 180


def test_ties_count_half_and_a_diverged_training_is_worse_than_all():
    assert quality([1.0] * 6, list(range(6))).accuracy == 0.5
    assert quality([0, 1, 2, math.inf, math.inf], [0, 1, 2, 3, 4]).accuracy == 0.95


def test_the_pairs_within_the_best_half_are_those_of_the_better_architectures_by_truth():
    truth = list(range(8))
    found = quality([1, 0, 2, 3, 4, 5, 6, 7], truth)  # the best two are swapped
    assert found.accuracy == pytest.approx(27 / 28)
    assert found.accuracy_best_half == pytest.approx(5 / 6)
    assert found.regret == 1


def test_the_truth_is_each_architecture_at_its_own_best_rate_at_the_largest_size_on_the_test_part():
    rows = simulated()
    truth = Rows(rows).truth()
    assert truth.size == 8000
    assert truth.scores == {f"architecture {i}": pytest.approx(2 + 0.01 * i) for i in range(24)}
    assert set(truth.seeds.values()) == {2}
    assert truth.costs["architecture 0"] == pytest.approx(4 * 3 * 16_000 * 800_000)  # three rates and one more seed


def test_a_size_at_which_few_architectures_have_all_rates_is_no_truth_yet():
    rows = [row for row in simulated() if row.size == 1000 or int(row.pattern.split()[1]) < 10]
    assert Rows(rows).truth().size == 1000
    with pytest.raises(StudyError) as caught:
        Rows(rows[:20]).truth()
    assert (caught.value.field, caught.value.got) == ("truth", 20)


def test_trainings_of_two_settings_are_not_mixed():
    rows = simulated()
    with pytest.raises(StudyError) as caught:
        Rows([*rows, dataclasses.replace(rows[0], settings="other", seed=7)])
    assert (caught.value.field, caught.value.got) == ("settings", "other")


def test_own_rates_decide_all_pairs_of_a_truth_without_noise_and_one_rate_for_all_does_not():
    rows = Rows(simulated())
    truth = rows.truth()
    own, shared = judge(rows, policy(), truth), judge(rows, policy(rate="0.012"), truth)
    assert own.quality.accuracy == 1 and own.quality.regret == 0
    # A third of the architectures stand at their best rate there, the others 0.1 nats worse.
    wrong = sum((j % 3 == 0) and (i % 3 != 0) and j - i < 10 for i in range(24) for j in range(i + 1, 24)) + 0.5 * sum(
        (j % 3 == 0) and (i % 3 != 0) and j - i == 10 for i in range(24) for j in range(i + 1, 24)
    )
    assert shared.quality.accuracy == pytest.approx(1 - wrong / 276, abs=0.02)


def test_costs_are_flops_of_all_trainings_beside_the_truths():
    rows = Rows(simulated())
    truth = rows.truth()
    whole = 3 * 2000 * 100_000 / (4 * 3 * 16_000 * 800_000)  # one training of the small size
    expected = {
        policy(rate="0.012"): whole,
        policy(): 3 * whole,
        policy(rung=0.25, seeds=1): 0.75 * whole,
        policy(signal=TRUNK, rate="0.012", rung=0.5): 0.425 * whole,
        policy(signal=COSINE, rate="0.012", rung=0.5): 0.5 * whole,
        policy(rate=HALVED, rung=0.25): (2 * 0.125 + 0.25 + 0.13 * 0.125 / 0.875) * whole,
        policy(signal=EXTRAPOLATED, rate="0.012", rung=0.5): (0.5 + 0.13 * 0.375 / 0.875) * whole,
    }
    for one, cost in expected.items():
        assert judge(rows, one, truth).compute_fraction == pytest.approx(cost), one


def test_seeds_are_averaged_and_paid_for_at_the_best_rate_alone():
    rows = Rows(simulated())
    truth = rows.truth()
    one, two = (rows.scores(policy(seeds=n), ["architecture 0"])["architecture 0"] for n in (1, 2))
    assert two[1] == pytest.approx(4 / 3 * one[1])
    assert rows.scores(policy(seeds=3), ["architecture 0"]) == {}
    assert judge(rows, policy(seeds=3), truth) is None


def test_of_two_stages_the_first_drops_the_worse_half_and_fresh_seeds_order_the_rest():
    rate = RATES[0]
    rows = [row for row in simulated(sizes=(1000,), seeds=1) if row.rate == rate and row.schedule == "wsd"]
    last = len(rows) - 1
    fresh = [  # the second stage sees the opposite order
        dataclasses.replace(row, seed=1, losses=dict.fromkeys(row.losses, 3 - 0.01 * at)) for at, row in enumerate(rows)
    ]
    two = policy(rate=f"{rate:g}", rung=0.5, first=0.25)
    names = [row.pattern for row in rows]
    found = Rows([*rows, *fresh], [rate]).scores(two, names)
    one = Rows(rows, [rate]).scores(policy(rate=f"{rate:g}", rung=0.25), names)
    places = sorted(names, key=lambda name: (one[name], name))
    half = len(rows) // 2
    expected = [*sorted(places[:half], key=names.index, reverse=True), *places[half:]]
    assert [name for name, _ in sorted(found.items(), key=lambda item: item[1])] == expected
    whole = 3 * rows[last].flops_per_token * rows[last].tokens
    assert found[places[0]][1] == pytest.approx((0.25 + 0.5) * whole)
    assert found[places[-1]][1] == pytest.approx(0.25 * whole)


def test_two_stages_are_judged_by_seeds_that_neither_looked_at():
    rows = Rows(simulated(seeds=3, sizes=(8000,)))
    two = policy(size=8000, rate="0.012", first=0.25, rung=0.5)
    best = {f"architecture {i}" for i in range(0, 24, 3)}  # those with further seeds at this rate
    assert two.used == 2
    assert set(rows.scores(two, best)) == best
    fit = Rows([row for row in rows.all if row.pattern in best])
    judged = judge(fit, two, fit.truth_at(8000))
    assert (judged.quality.n, judged.quality.accuracy, judged.shares_trainings) == (8, 1, False)


def test_a_policy_at_the_truths_own_size_is_judged_by_other_seeds_or_marked():
    with_seeds, without = Rows(simulated(seeds=2)), Rows(simulated(seeds=1))
    assert judge(with_seeds, policy(size=8000), with_seeds.truth()).shares_trainings is False
    assert judge(without, policy(size=8000), without.truth()).shares_trainings is True
    assert judge(without, policy(), without.truth()).shares_trainings is False


def test_the_default_is_the_policy_that_decides_best_within_the_compute():
    rows = Rows(simulated(noise=0.01))
    truth = rows.truth()
    judged = [one for p in policies(rows) if (one := judge(rows, p, truth, CHOOSING, draws=2))]
    chosen = choose(judged, 0.125)
    assert chosen.compute_fraction <= 0.125 and not chosen.shares_trainings
    assert chosen.quality.accuracy == max(
        one.quality.accuracy
        for one in judged
        if one.compute_fraction <= 0.125
        and not one.shares_trainings
        and one.quality.accuracy_best_half == chosen.quality.accuracy_best_half
    )
    assert choose(judged, 1e-9) is None


def test_a_power_law_through_three_rungs_is_continued_exactly():
    def law(tokens):
        return 1.5 + 3 * tokens**-0.3

    assert extrapolated([law(1), law(2), law(4)]) == pytest.approx(law(8))
    assert extrapolated([2.0, 2.1, 2.2]) == 2.2  # a loss that rises is not continued


def test_the_share_of_steps_is_found_on_a_known_curve():
    def made(pattern, rate, seed, losses):
        base = next(row for row in simulated(1, sizes=[1000]))
        return dataclasses.replace(base, pattern=pattern, rate=rate, seed=seed, losses=losses)

    slow = {0.125: 2.6, 0.25: 2.4, 0.5: 2.2, 1.0: 2.0}
    fast = {0.125: 2.2, 0.25: 2.1, 0.5: 2.0, 1.0: 1.9}
    rows = Rows(
        [made(name, rate, 0, losses) for name, losses in (("M", slow), ("E", fast)) for rate in (0.004, 0.012, 0.036)]
    )
    found = step_share(rows, 1000, "E", "M")
    assert (found.share, found.seeds, found.interval) == (pytest.approx(0.5), 1, None)
    assert found.gap == pytest.approx(0.1)
    assert step_share(rows, 1000, "M", "E").share is None
    assert step_share(rows, 1000, "E", "absent") is None


def test_the_measured_budget_becomes_a_sentence_and_an_unmeasured_one_says_so():
    rows = Rows(simulated())
    body = measure(rows, rows.truth(), {"parameters": dict.fromkeys(rows.patterns, 1.0)}, draws=20)
    assert body["reporting"]["n"] == 12 and body["truth"]["architectures"] == {CHOOSING: 12, REPORTING: 12}
    assert body["signals"][0]["accuracy"] == 0.5
    words = budget_words(body, signal=ANNEALED, rate=OWN, active_params=1000, tokens_per_active_param=90)
    assert words == (
        "comparisons at this budget agree with fully tuned models 8 times larger in 100 % of pairs "
        "(95 % interval 100 to 100 %), and in 100 % of those within the better half"
    )
    assert "was not measured" in budget_words(
        body, signal=COSINE, rate=OWN, active_params=1000, tokens_per_active_param=20
    )


def test_the_policy_nearest_in_size_tokens_and_rate_stands_for_a_budget():
    def policy(size, rung, rate, accuracy):
        own = {"signal": COSINE, "seeds": 1, "accuracy_interval": [0.0, 1.0], "accuracy_best_half": None}
        own["shares_trainings"] = size == 64_000 and rung == 1.0
        return {**own, "size": size, "rung": rung, "rate": rate, "accuracy": accuracy}

    policies = [
        *(policy(4_000, 0.25, rate, accuracy) for rate, accuracy in (("0.004", 0.61), ("0.012", 0.62))),
        *(policy(4_000, 1.0, rate, accuracy) for rate, accuracy in (("0.004", 0.63), ("0.012", 0.64))),
        *(policy(16_000, 0.25, rate, accuracy) for rate, accuracy in (("0.004", 0.65), ("0.012", 0.99))),
        policy(64_000, 0.25, "0.004", 0.66),
        policy(64_000, 1.0, "0.004", 0.98),  # the truth itself
    ]
    body = {"policies": policies, "truth": {"size": 64_000, "tokens_per_active_param": 100}}

    def words(active_params, tokens, rate):
        return budget_words(body, signal=COSINE, rate=rate, active_params=active_params, tokens_per_active_param=tokens)

    assert "at this budget agree" in words(5_000, 20, 0.003)
    assert "in 61 % of pairs" in words(5_000, 20, 0.003)
    assert "in 62 % of pairs" in words(5_000, 20, 0.02)
    assert words(2_000, 90, 0.012) == (
        "comparisons at 4,000 active parameters and 100 tokens for each, the nearest that was measured, agree with "
        "fully tuned models 16 times larger in 64 % of pairs (95 % interval 0 to 100 %)"
    )
    assert "fully tuned models 4 times larger that trained 4 times longer in 65 % of pairs" in words(30_000, 20, 0.004)
    assert "models of the same size that trained 4 times longer in 66 % of pairs" in words(60_000, 90, 0.004)
    assert "was not measured" in words(5_000, 20, "scaled")
