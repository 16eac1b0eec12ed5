"""What a report claims: only what was measured."""

import json

import pytest

from hybridnas.report.claims import budget_note
from hybridnas.study.records import StudyMeta

POLICIES = [
    {"signal": "annealed", "rate": "halved", "seeds": 1, "size": 16_000, "rung": 0.5, "accuracy": 0.83,
     "accuracy_interval": [0.79, 0.88]},
    {"signal": "cosine", "rate": "0.012", "seeds": 1, "size": 16_000, "rung": 0.25, "accuracy": 0.7,
     "accuracy_interval": [0.6, 0.8]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"schedule": "wsd", "rate": "tuned"}, "agree with 4 times larger, fully tuned models in 83 % of pairs"),
        ({}, "in 70 % of pairs (95 % interval 60 to 80 %)"),
        ({"schedule": "wsd"}, "was not measured"),
        ({"rate": "scaled"}, "was not measured"),
    ],
    ids=["tuned", "as-ever", "unmeasured", "scaled"],
)
def test_a_report_says_how_often_comparisons_at_its_budget_decide_rightly(tmp_path, fields, part):
    path = tmp_path / "decisions.json"
    path.write_text(json.dumps({"policies": POLICIES, "truth": {"size": 64_000, "tokens_per_active_param": 100}}))
    meta = StudyMeta(name="s", tokens=800_000, active_params=16_000, lr=0.012, **fields)
    assert part in budget_note(meta, path)


def test_nothing_is_said_where_nothing_was_trained_and_no_figure_where_none_was_measured(tmp_path):
    meta = StudyMeta(name="s", tokens=800_000, active_params=16_000, lr=0.012)
    assert "was not measured" in budget_note(meta, tmp_path / "absent.json")
    assert budget_note(StudyMeta(name="s", from_table=True, tokens=1, active_params=1)) is None
    assert budget_note(StudyMeta(name="s")) is None
