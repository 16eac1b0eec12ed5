"""Successive halving without barriers: who is promoted, who waits, and that a paused run goes on to the bit."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridnas.search.pruning.halving import best_of, goes_on, may_return, next_promotion


def test_nobody_is_promoted_from_a_rung_with_fewer_than_reduction():
    assert next_promotion({10: {0: 1.0, 1: 2.0}, 30: {}}, 3) is None
    assert next_promotion({10: {}, 30: {}}, 3) is None
    assert next_promotion({}, 3) is None


def test_a_later_worse_arrival_makes_a_paused_candidate_promotable():
    assert next_promotion({10: {0: 1.0, 1: 2.0, 2: 3.0}, 30: {}}, 3) == 0
    assert next_promotion({10: {0: 1.0, 1: 2.0, 2: 3.0}, 30: {0: 0.5}}, 3) is None


def test_the_highest_rung_comes_first_and_the_last_promotes_nobody():
    scores = {10: {n: float(n) for n in range(9)}, 30: {0: 0.3, 1: 0.2, 3: 0.4}, 90: {}}
    assert next_promotion(scores, 3) == 1
    scores[90] = {1: 0.1}
    assert next_promotion(scores, 3) == 2
    assert next_promotion({90: {1: 0.1, 2: 0.2, 3: 0.3}}, 3) is None


def test_who_is_busy_counts_but_is_not_promoted():
    scores = {10: {n: float(n) for n in range(6)}, 30: {}}
    assert next_promotion(scores, 3, skip={0}) == 1
    assert next_promotion(scores, 3, skip={0, 1}) is None


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(2, 5))
def test_who_goes_on_is_among_the_best(losses, reduction):
    scores = {number: float(loss) for number, loss in enumerate(losses)}
    going = [number for number in scores if goes_on({10: scores}, reduction, 10, number)]
    assert going == sorted(best_of(scores, reduction))


def test_of_equals_the_earlier_one_is_better():
    assert best_of({5: 1.0, 2: 1.0, 9: 0.5}, 1) == [9, 2, 5]
    assert goes_on({10: {5: 1.0, 2: 1.0}}, 2, 10, 2)
    assert not goes_on({10: {5: 1.0, 2: 1.0}}, 2, 10, 5)


def test_a_candidate_is_kept_while_it_could_still_be_promoted():
    scores = {10: {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}, 30: {0: 0.5}}
    assert may_return(scores, 2, to_come=0) == [1]
    assert may_return(scores, 2, to_come=2) == [1, 2]
    assert sorted(may_return(scores, 2, to_come=99)) == [1, 2, 3]


@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 60), st.integers(0, 10**6))
def test_simulated_to_the_end_each_rung_has_its_best_in_the_next(reduction, rungs, arrivals, seed):
    """Oracle: run the loop; at the end nothing is promotable, and nobody was promoted who may not return."""
    chance = random.Random(seed)
    quality = [chance.random() for _ in range(arrivals)]
    scores = {rung: {} for rung in range(rungs)}

    def climb(number, rung):
        while True:
            scores[rung][number] = quality[number] + 0.1 * chance.random()
            if rung == rungs - 1 or not goes_on(scores, reduction, rung, number):
                return
            rung += 1

    lost = set()
    for number in range(arrivals):
        climb(number, 0)
        while (again := next_promotion(scores, reduction)) is not None:
            assert again not in lost
            assert again in may_return(scores, reduction, arrivals - number - 1)
            climb(again, 1 + max(rung for rung in scores if again in scores[rung]))
        lost |= set(range(number + 1)) - set(may_return(scores, reduction, arrivals - number - 1))
    for rung in range(rungs - 1):
        assert set(best_of(scores[rung], reduction)) <= set(scores[rung + 1])
    assert may_return(scores, reduction, 0) == []


@pytest.mark.parametrize("reduction", [2, 3])
def test_the_tokens_of_a_promotion_are_those_from_its_rung_on(reduction):
    """A resumed candidate costs the difference between rungs; trained again from nothing it would cost the sum."""
    resumed = sum(b - a for a, b in [(0, 1), (1, reduction), (reduction, reduction**2)])
    assert resumed == reduction**2 < 1 + reduction + reduction**2
