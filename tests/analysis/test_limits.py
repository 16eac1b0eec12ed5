"""What the limits of a study did, from records alone: the winner, the nearest miss, the price of each limit."""

import pytest

from hybridnas.analysis.limits import limits_of, limits_report, sentences
from hybridnas.errors import StudyError
from hybridnas.study.objectives import violation, within_spread
from hybridnas.study.records import TrialRecord

LIMITS = {"max_state_bytes": 200.0, "min_decode_tokens_per_second": 5000.0}


def record(number, loss, state_bytes, speed, state="COMPLETE", **more):
    cost = {"params": 10, "active_params": 10, "flops_per_token": 20.0, "state_bytes": 1}
    figures = {"state_bytes": state_bytes, "decode_tokens_per_second": speed}
    values = {"state_bytes": state_bytes, "decode_tokens_per_second": speed}
    marginal = within_spread(LIMITS, values, more.get("spread", {}))
    out = violation({name: bound for name, bound in LIMITS.items() if name not in marginal}, values)
    return TrialRecord(
        number=number, state=state, pattern=f"M{number}", cost=cost, figures=figures, valid_loss=loss,
        objectives={} if loss is None else {"val_loss": loss}, violation=out, within_spread=marginal, **more,
    )  # fmt: skip


def test_the_winner_keeps_all_limits_and_each_limit_has_its_price():
    found = limits_report(
        [
            record(0, 1.0, 900.0, 9000.0),
            record(1, 1.5, 100.0, 4000.0),
            record(2, 2.0, 100.0, 9000.0),
            record(3, 0.5, 900.0, 100.0),
        ],
        LIMITS,
        4096,
    )
    assert found.winner.number == 2
    assert [(price.limit, price.best.number, price.loss) for price in found.prices] == [
        ("max_state_bytes", 0, -1.0),
        ("min_decode_tokens_per_second", 1, -0.5),
    ]


def test_where_nobody_keeps_the_limits_the_nearest_is_the_least_bad_in_its_worst_limit():
    found = limits_report([record(0, 1.0, 220.0, 1000.0), record(1, 2.0, 300.0, 4000.0)], LIMITS)
    assert found.winner is None
    assert (found.nearest.record.number, found.nearest.limit) == (1, "max_state_bytes")
    assert found.nearest.share == pytest.approx(0.5)
    assert len(sentences(found)) == 2


def test_a_limit_inside_the_spread_of_a_measurement_is_met_and_marked():
    near = record(0, 1.0, 100.0, 4900.0, spread={"decode_tokens_per_second": [4700.0, 5100.0]})
    far = record(1, 0.5, 100.0, 4000.0, spread={"decode_tokens_per_second": [3900.0, 4100.0]})
    found = limits_report([near, far], LIMITS)
    assert found.winner.number == 0
    assert [one.number for one in found.marginal] == [0]


def test_refused_draws_are_counted_by_what_they_broke():
    drawn = record(0, 1.0, 100.0, 9000.0, refused={"requires": 3, "max_state_bytes": 2})
    measured = record(1, None, 100.0, 100.0, state="INFEASIBLE")
    found = limits_report([drawn, measured], LIMITS)
    assert found.refused == {"requires": 3, "max_state_bytes": 2, "min_decode_tokens_per_second": 1}


def test_a_limit_of_another_version_is_named():
    with pytest.raises(StudyError) as caught:
        limits_of({"study": "a", "identity": {"max_joules": 3.0, "max_params": None}})
    assert (caught.value.field, caught.value.got) == ("max_joules", 3.0)
    assert limits_of({"identity": {"max_params": 5, "max_latency_ms": None}}) == {"max_params": 5.0}
