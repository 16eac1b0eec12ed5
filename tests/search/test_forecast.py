"""What a search says it will take: counted by hand from a speed."""

import pytest

from hybridnas.search.config import Budget
from hybridnas.search.forecast import forecast
from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.study.records import COMPLETE, TrialRecord

SPACE = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [3], "baselines": []}
SIZES = {"d_model": 16, "depth": 3, "seq_len": 100, "batch_size": 1, "evals": 1, "valid_tokens": 300}


@pytest.mark.parametrize(("confirm", "trainings"), [("off", 0), ("on", 2 * (2 + 3) + 3 * 4)])
def test_the_time_of_candidates_and_of_their_confirmation_is_counted_by_hand(confirm, trainings):
    budget = Budget(**SIZES, tokens_per_active_param=1, rungs=2, reduction=3, confirm=confirm, confirm_top=2)
    candidates = Candidates(Space.from_mapping(SPACE), Scale(d_model=16, depth=3, multiple=1, n_experts=2))
    plan = Plan(
        candidates=candidates, rungs=budget.rung_tokens(900), reduction=3, n_trials=50, minutes=0.1, pruner="none"
    )
    done = TrialRecord(number=0, pattern="MAF", state=COMPLETE, tokens_per_second=1000.0)
    history = History(plan.objectives, plan.rungs)
    history.put(done)
    found = forecast(plan, budget, history, confirmers=2)
    beside = forecast(plan, budget, history, workers=4)
    # 900 tokens and two evaluations of 300, which cost a third of training, at 1,000 tokens per second
    assert found.candidate_seconds == pytest.approx(1.1)
    assert (found.baselines, found.candidates) == (0, 5)
    assert (beside.candidates, beside.candidate_seconds) == (21, pytest.approx(1.1 / 4))
    assert found.confirm_seconds == pytest.approx(trainings * 1.1 / 2)
