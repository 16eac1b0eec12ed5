"""Hyperband (Li et al. 2018, arXiv 1603.06560) through Optuna's pruner, on a study in memory that the records make.

Optuna's pruner keeps a note on a trial for every rung that it has passed and looks for these notes on the others. They
lie in the records (``TrialRecord.marks``), as everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridnas.search.history import History
from hybridnas.search.sampling.optuna_view import OptunaView, hyperband, quiet


def stops(
    view: OptunaView, history: History, number: int, reached: Mapping[int, float], marks: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Say whether a trial ends at the last of the rungs that it has reached, and what the pruner notes on it.

    ``reached``: rung -> objective. ``marks``: what is noted on the trial already, and is kept.
    """
    pruner = hyperband(view.rungs)
    if pruner is None:
        return False, dict(marks)
    with quiet():
        records = history.ordered()
        study = view.study(records, pruner=pruner, below=number)
        trial = study.ask()  # gets this trial's number, by which Hyperband chooses its bracket
        view.extend(study, records, start=number + 1)
        ends = False
        for tokens, value in sorted(reached.items()):
            trial.report(value, tokens)
            ends = trial.should_prune()
        noted = study.get_trials(deepcopy=False)[number].system_attrs
    return ends, {**marks, **{key: value for key, value in noted.items() if key.startswith("completed_rung")}}
