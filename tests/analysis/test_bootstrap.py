"""Differences of two architectures: intervals over seeds, over documents and over both, p-values, Holm's adjustment."""

import math

import numpy as np
import pytest
from scipy import stats

from hybridnas.analysis.bootstrap import LEAST_DOCUMENTS, difference, holm
from hybridnas.study.documents import DocumentSums, read_documents, write_documents

SAME = dict.fromkeys("123456", 0.0)


def sums(nats, tokens):
    return DocumentSums(tuple(range(len(nats))), tuple(nats), tuple(tokens), tuple(tokens))


def study(nats_SD, tokens_D):
    """Return results and losses by document of two architectures, of which the second is always at zero."""
    nothing = sums([0.0] * len(tokens_D), tokens_D)
    pairs = {str(seed): (sums(nats_D, tokens_D), nothing) for seed, nats_D in enumerate(nats_SD)}
    results = {seed: sum(ours.nats) / sum(tokens_D) for seed, (ours, _) in pairs.items()}
    return results, dict.fromkeys(results, 0.0), pairs


def test_over_seeds_alone_it_is_a_paired_t_test():
    a, b = {"1": 1.0, "2": 1.2, "3": 1.1, "4": None}, {"1": 1.3, "2": 1.4, "3": 1.45, "4": 1.0}
    found = difference(a, b)
    test = stats.ttest_rel([1.0, 1.2, 1.1], [1.3, 1.4, 1.45])
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert (found.p, found.seeds, found.documents) == (pytest.approx(test.pvalue), 3, 0)
    low, high = test.confidence_interval(0.99)
    assert difference(a, b, alpha=0.01).half == pytest.approx((high - low) / 2)
    assert found.sources == "3 seeds"


def test_too_few_seeds_have_no_interval():
    one = difference({"1": 1.0, "2": None}, {"1": 1.1, "2": 1.3})
    assert (one.mean, one.half, one.p, one.seeds) == (pytest.approx(-0.1), None, None, 1)
    none = difference({"1": 1.0}, {"2": 1.0})
    assert math.isnan(none.mean)
    assert (none.half, none.p, none.clear) == (None, None, False)


def test_equal_results_differ_in_nothing():
    same = difference(SAME, SAME)
    assert (same.mean, same.half, same.p, same.clear) == (0.0, 0.0, 1.0, False)


def test_over_documents_of_one_length_it_is_a_t_test_of_their_differences():
    rng = np.random.default_rng(0)
    nats_D = rng.normal(20.0, 50.0, 400)
    found = difference(*study([nats_D], [1000] * 400))
    test = stats.ttest_1samp(nats_D / 1000, 0.0)
    low, high = test.confidence_interval(0.95)
    assert found.mean == pytest.approx(nats_D.mean() / 1000)
    assert found.half == pytest.approx((high - low) / 2, rel=0.08)  # a bootstrap of 1,000 resamples
    assert (found.documents, found.sources) == (400, "400 documents, one seed")


def test_documents_widen_an_interval_over_seeds():
    rng = np.random.default_rng(1)
    seeds_S, documents_D = rng.normal(0, 10.0, 5), rng.normal(0, 60.0, 40)
    nats_SD = seeds_S[:, None] + documents_D
    results, nothing, pairs = study(nats_SD, [1000] * 40)
    both, seeds = difference(results, nothing, pairs), difference(results, nothing)
    assert both.half > seeds.half
    variance = seeds_S.var(ddof=1) / 5 + documents_D.var(ddof=1) / 40
    freedom = variance**2 / ((seeds_S.var(ddof=1) / 5) ** 2 / 4 + (documents_D.var(ddof=1) / 40) ** 2 / 39)
    assert both.half == pytest.approx(stats.t.ppf(0.975, freedom) * math.sqrt(variance) / 1000, rel=0.08)
    assert both.sources == "5 seeds and 40 documents"


def test_noise_of_seed_and_document_together_is_counted_once():
    rng = np.random.default_rng(2)
    nats_SD = rng.normal(0, 60.0, (6, 500))
    found = difference(*study(nats_SD, [1000] * 500))
    means_S = nats_SD.mean(axis=1) / 1000
    assert found.half < 1.3 * stats.t.ppf(0.975, 5) * means_S.std(ddof=1) / math.sqrt(6)


@pytest.mark.parametrize("count", [LEAST_DOCUMENTS - 1, LEAST_DOCUMENTS])
def test_few_documents_are_left_out(count):
    results, nothing, pairs = study(np.arange(3.0 * count).reshape(3, count), [10] * count)
    assert difference(results, nothing, pairs).documents == (0 if count < LEAST_DOCUMENTS else count)


def test_documents_that_differ_or_are_missing_are_left_out():
    results, nothing, pairs = study(np.random.default_rng(3).normal(size=(4, 9)), [10] * 9)
    assert difference(results, nothing, pairs).documents == 9
    assert difference(results, nothing, {"0": pairs["0"]}).documents == 0
    other = {**pairs, "2": (pairs["2"][0], sums([0.0] * 9, [10] * 8 + [11]))}
    assert difference(results, nothing, other).documents == 0


def test_holms_adjustment_is_that_of_its_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_losses_by_document_come_back_from_their_file(tmp_path):
    kept = sums([1.5, 2.25], [3, 4])
    write_documents(tmp_path, kept)
    assert read_documents(tmp_path).same_places(kept)
    assert list(read_documents(tmp_path).nats) == [1.5, 2.25]
    assert read_documents(tmp_path / "absent") is None
