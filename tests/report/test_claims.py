"""What a report claims: only what was measured."""

import json

import pytest

from hybridnas.report.claims import budget_notes
from hybridnas.study.records import StudyMeta


def _policy(signal, rate, rung, accuracy, interval, seeds=1):
    return {
        **{"signal": signal, "rate": rate, "seeds": seeds, "size": 16_000, "rung": rung, "accuracy": accuracy},
        **{"accuracy_interval": interval, "accuracy_best_half": 0.6, "shares_trainings": False},
    }


POLICIES = [
    _policy("annealed", "halved", 0.5, 0.83, [0.79, 0.88]),
    _policy("annealed", "own", 0.5, 0.87, [0.79, 0.91], seeds=2),
    _policy("cosine", "0.012", 0.25, 0.7, [0.6, 0.8]),
]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"schedule": "wsd", "rate": "tuned"},
            (
                "fully tuned models 4 times larger that trained 2 times longer in 83 % of pairs",
                "in 60 % of those within the better half",
            ),
        ),
        ({}, ("in 70 % of pairs (95 % interval 60 to 80 %)",)),
        ({"schedule": "wsd"}, ("was not measured",)),
        ({"rate": "scaled"}, ("was not measured",)),
    ],
    ids=["tuned", "as-ever", "unmeasured", "scaled"],
)
def test_a_report_says_how_often_comparisons_at_its_budget_decide_rightly(tmp_path, fields, parts):
    meta = StudyMeta(name="s", tokens=800_000, active_params=16_000, lr=0.012, **fields)
    (note,) = budget_notes(meta, decisions=_measured(tmp_path))
    assert [part for part in parts if part not in note] == []


def test_a_second_sentence_tells_of_those_that_were_confirmed_at_their_own_rates(tmp_path):
    meta = StudyMeta(name="s", tokens=800_000, active_params=16_000, lr=0.012, schedule="wsd", rate="tuned")
    first, second = budget_notes(meta, confirmed=True, decisions=_measured(tmp_path))
    assert "83 %" in first and "87 % of pairs (95 % interval 79 to 91 %)" in second


def _measured(folder):
    path = folder / "decisions.json"
    path.write_text(json.dumps({"policies": POLICIES, "truth": {"size": 64_000, "tokens_per_active_param": 100}}))
    return path


def test_nothing_is_said_where_nothing_was_trained_and_no_figure_where_none_was_measured(tmp_path):
    meta = StudyMeta(name="s", tokens=800_000, active_params=16_000, lr=0.012)
    (note,) = budget_notes(meta, decisions=tmp_path / "absent.json")
    assert "was not measured" in note
    assert budget_notes(StudyMeta(name="s", from_table=True, tokens=1, active_params=1)) == []
    assert budget_notes(StudyMeta(name="s")) == []
