"""Hyperband (Li et al. 2018, arXiv 1603.06560) through Optuna's pruner, on a study in memory that the records make.

Optuna's pruner keeps a note on a trial for every rung that it has passed and looks for these notes on the others. They
lie in the records (``TrialRecord.marks``), as everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridnas.search.history import History
from hybridnas.search.sampling.optuna_view import STUDY, OptunaView, hyperband, quiet
from hybridnas.study.objectives import directions
from hybridnas.study.records import TrialRecord

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


def stops(
    view: OptunaView, history: History, number: int, reached: Mapping[int, float], marks: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Say whether a trial ends at the last of the rungs that it has reached, and what the pruner notes on it.

    ``reached``: rung -> objective. ``marks``: what is noted on the trial already, and is kept.
    """
    import optuna

    pruner = hyperband(view.rungs)
    if pruner is None:
        return False, dict(marks)
    records = history.ordered()
    with quiet():
        study = optuna.create_study(
            study_name=STUDY,
            sampler=optuna.samplers.RandomSampler(seed=0),
            pruner=pruner,
            directions=directions(view.objectives),
        )
        study.add_trials(_noted(records, range(number)))
        trial = study.ask()  # gets this trial's number, by which Hyperband chooses its bracket
        study.add_trials(_noted(records, range(number + 1, max((r.number for r in records), default=0) + 1)))
        ends = False
        for tokens, value in sorted(reached.items()):
            trial.report(value, tokens)
            ends = trial.should_prune()
        noted = study.get_trials(deepcopy=False)[number].system_attrs
    return ends, {**marks, **{key: value for key, value in noted.items() if key.startswith("completed_rung")}}


def _noted(records: Sequence[TrialRecord], numbers: range) -> list[FrozenTrial]:
    """Return the trials of these numbers with the pruner's notes, which is all that it looks at.

    Choices are left out: Optuna copies every trial deeply, and those of a trial are most of it.
    """
    from optuna.trial import TrialState, create_trial

    marks = {record.number: dict(record.marks) for record in records}
    return [create_trial(state=TrialState.PRUNED, system_attrs=marks.get(number, {})) for number in numbers]
