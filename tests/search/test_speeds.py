"""Predicted speeds: the regression, its error, and what it refuses; and the share of a space that keeps its limits."""

import json
import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest

from hybridnas.errors import ConfigError
from hybridnas.search import speeds
from hybridnas.search.feasible import Share, estimate
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.sampling.uniform import evenly
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.study.records import TrialRecord

SPACE = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [4], "baselines": []}
SCALE = Scale(d_model=16, depth=4, multiple=1, n_experts=2)
TIMES = {"M": 2.0, "A": 1.0, "F": 0.25}  # of a layer [ms]


def candidates_of(**more):
    return Candidates(Space.from_mapping(SPACE), SCALE, **more)


def time_of(candidate):
    return sum(TIMES[slot.letter] for slot in candidate.arch.pattern.slots)


def measured(candidates, count, seed=0):
    """Return records of candidates whose times add up over their layers."""
    chance, found = random.Random(seed), {}
    while len(found) < count:
        one = candidates.of(evenly(candidates, chance).params)
        found[one.key] = one
    return {
        number: TrialRecord(
            number=number, state="COMPLETE", pattern=one.pattern, fingerprint=one.key, cost=one.cost,
            figures={"ms_per_token": time_of(one)},
        )
        for number, one in enumerate(found.values())
    }  # fmt: skip


def test_the_error_of_a_fit_is_that_of_leaving_each_measurement_out():
    records = measured(candidates_of(), 14)
    rows = [(speeds.features(one.pattern, one.cost), one.figures["ms_per_token"]) for one in records.values()]
    found = speeds.fit("ms_per_token", rows)
    names = sorted({name for known, _ in rows for name in known})
    x = np.array([[known.get(name, 0.0) for name in names] for known, _ in rows])
    x, y = x[:, x.std(axis=0) > 1e-9], np.array([value for _, value in rows])
    y = y / y.mean()
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    misses = []
    for out in range(len(rows)):
        kept = [i for i in range(len(rows)) if i != out]
        a = np.hstack([np.ones((len(kept), 1)), z[kept]])
        penalty = np.diag([0.0, *[speeds._RIDGE] * z.shape[1]])
        weights = np.linalg.solve(a.T @ a + penalty, a.T @ y[kept])
        misses.append(y[out] - np.array([1.0, *z[out]]) @ weights)
    assert found.error == pytest.approx(math.sqrt(np.mean(np.square(misses))), rel=1e-9)


def test_a_prediction_is_near_and_refuses_what_is_far_beyond_a_limit_alone():
    candidates = candidates_of()
    records = measured(candidates, 24)
    known = speeds.predictors(records.values(), ["ms_per_token"])["ms_per_token"]
    assert known.n == 24
    assert known.error < 0.1
    slow, quick = (candidates.of({f"slot{i}": letter for i in range(4)}) for letter in "MF")
    for one in (slow, quick):
        expected, error = known.time(one.pattern, one.cost)
        assert abs(expected - time_of(one)) < speeds.ERRORS * error
    unlikely = speeds.outlook(records, {"max_latency_ms": 3.0})
    assert unlikely(slow) == "max_latency_ms (predicted)"
    assert unlikely(quick) is None
    assert speeds.outlook(records, {"max_latency_ms": 7.9})(slow) is None  # inside the error
    few = dict(list(records.items())[: speeds.FEWEST - 1])
    assert speeds.outlook(few, {"max_latency_ms": 0.1})(slow) is None


def test_predictors_are_made_from_the_records_and_kept(tmp_path):
    records = measured(candidates_of(), 10)
    read = {n: TrialRecord.from_dict(json.loads(json.dumps(one.to_dict()))) for n, one in records.items()}
    speeds.write(tmp_path, records, ["ms_per_token"])
    stored = json.loads((tmp_path / speeds.FILE).read_text())["ms_per_token"]
    assert stored == vars(speeds.predictors(read.values(), ["ms_per_token"])["ms_per_token"])


def test_the_interval_of_a_share_is_wilsons():
    for within, drawn in ((35, 200), (0, 60), (200, 200)):
        theirs = binomtest(within, drawn).proportion_ci(method="wilson")
        assert Share(drawn, within, {}).interval == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_the_share_of_a_small_space_is_near_what_counting_all_of_it_gives():
    limited = candidates_of(limits={"max_state_bytes": 200_000.0}, state_length=4096)
    found = estimate(limited, seed=0)
    motifs = [[a, b, c, d] for a in "MAF" for b in "MAF" for c in "MAF" for d in "MAF"]
    kept = [limited.of({f"slot{i}": x for i, x in enumerate(motif)}).arch is not None for motif in motifs]
    low, high = found.interval
    assert low <= sum(kept) / 81 <= high
    assert found.drawn == found.within + sum(found.refused.values())


def test_limits_that_exclude_each_other_are_refused_with_what_is_reached():
    least = {"max_state_bytes": 10.0, "max_flops": 100.0}
    with pytest.raises(ConfigError) as caught:
        estimate(candidates_of(limits=least, state_length=4096), seed=0, draws=30)
    assert caught.value.field == "max_flops"
    assert caught.value.allowed[0] > 100


def test_rules_that_no_pattern_keeps_are_refused():
    space = Space.from_mapping({**SPACE, "requires": ["C"]})
    with pytest.raises(ConfigError) as caught:
        estimate(Candidates(space, SCALE), seed=0, draws=20)
    assert caught.value.field == "space.requires"
