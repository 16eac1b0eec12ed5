"""Successive halving in a study: whose turn it is to go on, and how that becomes a trial that one worker takes.

A candidate keeps its number, folder and record from its first step to its last. Optuna cannot reopen a finished trial,
so going on is another one of its trials, with the user attributes ``continues`` (the candidate's number) and
``from_tokens``; it is not counted, and has no folder or record of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.ranking import rung_scores
from hybridnas.search.config import SearchConfig
from hybridnas.search.pruning import halving
from hybridnas.study.records import COMPLETE, FAIL, PRUNED, TrialRecord

if TYPE_CHECKING:
    import optuna

KEPT_PAUSED = 64  # checkpoints of paused candidates, best chance first; a disk is finite even where n_trials is not
CONTINUES, FROM_TOKENS = "continues", "from_tokens"


@dataclass(frozen=True)
class Ladder:
    """The rungs of a study and what is decided at them; all from its records, so any process decides alike."""

    rungs: tuple[int, ...]  # training tokens, rising
    reduction: int
    n_trials: int

    @property
    def remainder(self) -> float:
        """Share of a full training that is left to who goes on from the last rung before its end."""
        return 1.0 - self.rungs[-2] / self.rungs[-1] if len(self.rungs) > 1 else 1.0

    @classmethod
    def of(cls, config: SearchConfig, active_params: int) -> Ladder | None:
        """Return the ladder of a search that halves, None for one that does not."""
        if config.pruner != "halving":
            return None
        budget = config.budget
        return cls(budget.rung_tokens(active_params), budget.reduction, budget.n_trials)

    def goes_on(self, records: Iterable[TrialRecord], number: int, tokens: int, values: Mapping[str, float]) -> bool:
        """Whether a candidate with these objectives after ``tokens`` trains on at once; True between rungs."""
        if tokens not in self.rungs[:-1]:
            return True
        others = [record for record in records if record.number != number]
        scores = rung_scores(others, self.rungs, {tokens: {number: values}})
        return halving.goes_on(scores, self.reduction, tokens, number)

    def next(self, records: Iterable[TrialRecord], busy: Collection[int] = ()) -> int | None:
        """Return the paused candidate that should go on now, or None.

        Once as many as were asked for are there and none of them has been trained to the end (a short search, without
        baselines), it is the best of the highest rung: a search ends with a winner.
        """
        kept = list(records)
        scores = rung_scores(kept, self.rungs, {})
        found = halving.next_promotion(scores, self.reduction, busy)
        finished = sum(record.state in (COMPLETE, PRUNED, FAIL) for record in kept)
        if found is not None or busy or scores[self.rungs[-1]] or finished < self.n_trials:
            return found
        highest = next((scores[rung] for rung in reversed(self.rungs) if scores[rung]), {})
        return next(iter(halving.ranked(highest)), None)

    def hopeful(self, records: Collection[TrialRecord]) -> list[int]:
        """Return the paused candidates whose checkpoints are worth their room, at most KEPT_PAUSED."""
        finished = sum(record.state in (COMPLETE, PRUNED, FAIL) for record in records)
        scores = rung_scores(records, self.rungs, {})
        return halving.may_return(scores, self.reduction, max(0, self.n_trials - finished))[:KEPT_PAUSED]


def continues(trial: Any) -> int | None:
    """Return the number of the candidate that an Optuna trial goes on with, None for a trial of its own."""
    number = trial.user_attrs.get(CONTINUES)
    return number if isinstance(number, int) else None


def candidate_of(trial: Any) -> int:
    """Return the number under which an Optuna trial's candidate has its folder and record."""
    number = continues(trial)
    return trial.number if number is None else number


def busy(study: optuna.Study) -> set[int]:
    """Return the candidates that somebody goes on with, or is about to."""
    from optuna.trial import TrialState

    open_ones = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return {number for trial in open_ones if (number := continues(trial)) is not None}


def promote(study: optuna.Study, ladder: Ladder, records: Mapping[int, TrialRecord]) -> optuna.Trial | None:
    """Take up the paused candidate whose turn it is; None where nobody's is, or another worker was faster.

    The claim is Optuna's own step from WAITING to RUNNING, which only one process can make.
    """
    number = _left_waiting(study, records)
    if number is None:
        number = ladder.next(records.values(), busy(study))
        if number is None:
            return None
        attributes = {CONTINUES: number, FROM_TOKENS: records[number].tokens}
        study.enqueue_trial(study.get_trials(deepcopy=False)[number].params, user_attrs=attributes)
    return _claim(study, number)


def _left_waiting(study: optuna.Study, records: Mapping[int, TrialRecord]) -> int | None:
    """Return a candidate that was queued to go on by a process that then died."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return next((number for trial in waiting if (number := continues(trial)) in records and number is not None), None)


def _claim(study: optuna.Study, number: int) -> optuna.Trial | None:
    """Make the first waiting trial that goes on with ``number`` ours; others of the same moment are withdrawn."""
    from optuna.trial import Trial, TrialState

    every = [trial for trial in study.get_trials(deepcopy=False) if continues(trial) == number]
    waiting = [trial for trial in every if trial.state == TrialState.WAITING]
    taken = any(trial.state == TrialState.RUNNING for trial in every)
    ours = None
    for trial in waiting:
        if study._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
            if ours is None and not taken:
                ours = Trial(study, trial._trial_id)
            else:
                study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    return ours
