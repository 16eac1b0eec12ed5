"""A study of Optuna made from records: what Optuna's samplers and pruners decide by, and what its dashboard shows.

It lies in memory, is made anew for every decision, and is thrown away: the records are the truth, and this is one view
of them. Only Optuna's public API is used.
"""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hybridnas.search.sampling.candidates import Candidates, Parameter
from hybridnas.study.objectives import LIMITS, counted, directions, excess, of_eval
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, RUNNING, TrialRecord

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

STUDY = "hybridnas"  # the name of every study in memory: Hyperband chooses a trial's bracket by name and number


class OptunaView:
    """Makes Optuna trials and studies of records.

    ``full``: training tokens of a whole trial. ``rungs``: training tokens whose results Optuna is given.
    """

    def __init__(
        self,
        candidates: Candidates,
        objectives: Sequence[str],
        limits: Mapping[str, float],
        rungs: Sequence[int],
    ) -> None:
        self.candidates = candidates
        self.objectives = tuple(objectives)
        self.limits = dict(limits)
        self.rungs = tuple(rungs)
        self._made: dict[int, tuple[TrialRecord, FrozenTrial]] = {}

    def study(
        self,
        records: Sequence[TrialRecord],
        *,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        storage: Any = None,
        name: str = STUDY,
        below: int | None = None,
    ) -> Study:
        """Return a study with the trials of these records, by number; a number without a record is a failed trial.

        ``below``: leave out this number and those above it.
        """
        import optuna

        with quiet():
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                sampler=sampler or optuna.samplers.RandomSampler(seed=0),
                pruner=pruner or optuna.pruners.NopPruner(),
                directions=directions(self.objectives),
            )
        by_number = {record.number: record for record in records if below is None or record.number < below}
        end = max(by_number, default=-1) + 1 if below is None else below
        study.add_trials([self._trial(by_number.get(number)) for number in range(end)])
        return study

    def _trial(self, record: TrialRecord | None) -> FrozenTrial:
        """Return :meth:`trial` of a record, as it was made before where the record has not changed."""
        if record is None:
            return self.trial(None)
        made = self._made.get(record.number)
        if made is None or made[0] is not record:
            made = self._made[record.number] = (record, self.trial(record))
        return made[1]

    def trial(self, record: TrialRecord | None, *, at: Container[int] | None = None, live: bool = False) -> FrozenTrial:
        """Return a record as a trial of Optuna; a failed one for None.

        ``at``: training tokens of the intermediate values, by default the rungs. ``live``: as people are shown it. Then
        a trial that trains is running also where it was paused before (a sampler is given what it had reached), one
        that was rejected before any training has failed (a sampler is given its excess over the limits), and names,
        costs and the record's own state are attributes.
        """
        import optuna
        from optuna.trial import TrialState

        if record is None:
            return optuna.trial.create_trial(state=TrialState.FAIL)
        drawn = self.candidates.drawn(record.choices) if record.preset is None else None
        values = self._values(record)
        state = self._state(record, values, live)
        curve = {} if len(self.objectives) > 1 else self._curve(record, self.rungs if at is None else at)
        trial = optuna.trial.create_trial(
            state=state,
            values=values if state == TrialState.COMPLETE else None,
            params=drawn.params if drawn else {},
            distributions={name: distribution(one) for name, one in drawn.parameters.items()} if drawn else {},
            intermediate_values=curve,
            constraints=self._constraints(record),
            user_attrs={**_facts(record), **(_shown(record) if live else {})},
            system_attrs=dict(record.marks),
        )
        if live and record.legs and trial.state.is_finished():
            trial.datetime_complete = datetime.datetime.fromtimestamp(record.legs[-1][0])
            trial.datetime_start = trial.datetime_complete - datetime.timedelta(seconds=record.seconds)
        return trial

    def _values(self, record: TrialRecord) -> list[float] | None:
        found = [record.objectives.get(name) for name in self.objectives]
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else None

    def _state(self, record: TrialRecord, values: list[float] | None, live: bool) -> TrialState:
        from optuna.trial import TrialState

        if record.state == RUNNING:
            return TrialState.PRUNED if record.rungs and not live else TrialState.RUNNING
        whole = record.state == COMPLETE or (record.state == DUPLICATE and record.tokens >= self.rungs[-1])
        if whole:
            return TrialState.COMPLETE if values is not None else TrialState.FAIL
        if record.state == DUPLICATE:
            return TrialState.PRUNED if record.tokens else TrialState.FAIL
        if record.state == INFEASIBLE and live:
            return TrialState.FAIL
        return {PRUNED: TrialState.PRUNED, INFEASIBLE: TrialState.PRUNED}.get(record.state, TrialState.FAIL)

    def _curve(self, record: TrialRecord, at: Container[int]) -> dict[int, float]:
        if record.state == FAIL:
            return {}
        curve: Sequence[Mapping[str, Any]] = record.curve or [
            {"tokens": tokens, "valid_loss": loss} for tokens, loss in record.rungs
        ]
        found = {}
        for entry in curve:
            value = of_eval(self.objectives, record.objectives, entry).get(self.objectives[0])
            if value is not None and entry["tokens"] in at:
                found[int(entry["tokens"])] = value
        return found

    def _constraints(self, record: TrialRecord) -> dict[str, float] | None:
        if record.state == INFEASIBLE and not record.cost:
            return {"feasible": 1.0}
        if not self.limits or not record.cost:
            return None
        values = {**counted(record.cost, record.cost.get("state_bytes", 0.0)), **record.figures}
        return excess({name: limit for name, limit in self.limits.items() if LIMITS[name] in values}, values)


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return a choice as Optuna describes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if parameter.grid is not None:
        low, high, step = parameter.grid
        return FloatDistribution(low, high, step=step)
    return CategoricalDistribution(parameter.options)


def _facts(record: TrialRecord) -> dict[str, Any]:
    """Return what the dashboard shows of a trial besides choices and scores."""
    own = {
        "preset": record.preset,
        "pattern": record.pattern,
        "fingerprint": record.fingerprint,
        "duplicate_of": record.duplicate_of,
        "reason": record.reason,
    }
    return {name: value for name, value in own.items() if value not in (None, "")}


def _shown(record: TrialRecord) -> dict[str, Any]:
    """Return what only people are shown: the name, the state in the words of the report's file, costs and length."""
    own = {"name": record.name, "state": record.state, "trained_tokens": record.tokens, "violation": record.violation}
    return {name: value for name, value in {**own, **record.cost, **record.figures}.items() if value is not None}


def hyperband(rungs: Sequence[int]) -> BasePruner | None:
    """Return Optuna's Hyperband over the rungs' token counts; None where there is one rung alone."""
    import optuna

    if len(rungs) < 2:
        return None
    with quiet():
        return optuna.pruners.HyperbandPruner(
            min_resource=rungs[0], max_resource=rungs[-1], reduction_factor=rungs[1] // rungs[0]
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from announcing every study that is made, and from warning of what it calls experimental."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
