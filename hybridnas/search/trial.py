"""One trial: from a candidate to its record. What is known before training, what is decided at rungs, how it ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from hybridnas.arch.arch import Arch
from hybridnas.search import rates
from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.search.pruning import hyperband
from hybridnas.search.sampling.candidates import Draw
from hybridnas.study import objectives
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    TEST_FIGURES,
    TrialRecord,
)
from hybridnas.train.callbacks import Action
from hybridnas.train.records import Eval, TrainResult

if TYPE_CHECKING:
    from hybridnas.search.latency import Figure

DEATHS = 5  # times in a row that a trial's process ended without a step forward: then the trial itself is the cause
_STATES = {"completed": COMPLETE, "stopped": PRUNED, "paused": PRUNED, "failed": FAIL}
_REUSED = (
    *("valid_loss", "bits_per_byte", "accuracy", *TEST_FIGURES),
    *("rungs", "curve", "tokens", "tokens_per_second", "lr"),
    *("objectives", "figures", "spread", "within_spread", "violation"),
)


class Trainer(Protocol):
    """What gives an architecture its scores: training, or a table of what training gave."""

    def measured(self, number: int) -> Sequence[int]:
        """Return the training tokens at which a trial was evaluated by earlier processes."""
        ...

    def kept(self, number: int) -> bool:
        """Whether what was trained of a trial can be gone on with."""
        ...

    def progress(self, number: int) -> str:
        """Return a mark that changes whenever a trial has come further."""
        ...

    def figures(self, arch: Arch) -> Mapping[str, Figure]:
        """Return what was measured of an architecture on this machine, by objective; takes a second or two."""
        ...

    def try_rate(self, record: TrialRecord, arch: Arch, lr: float, tokens: int) -> rates.Tried:
        """Train an architecture at a learning rate up to its measurement at ``tokens``."""
        ...

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        """Train an architecture, or go on with it; ``on_eval`` gets every evaluation, earlier ones first."""
        ...

    def tidy(self, plan: Plan, history: History) -> None:
        """Delete what was kept of trials that will not go on."""
        ...


def new_record(plan: Plan, number: int, draw: Draw) -> TrialRecord:
    """Return the record of a candidate as it is before anything is trained: INFEASIBLE or RUNNING."""
    candidate = draw.candidate
    record = TrialRecord(
        number=number,
        state=RUNNING,
        pattern=candidate.pattern,
        fingerprint=candidate.fingerprint,
        preset=candidate.preset,
        choices=dict(candidate.choices),
        cost=dict(candidate.cost),
        seed=plan.seed,
        marks=dict(draw.marks),
        refused=dict(draw.refused),
    )
    if candidate.arch is None:
        return dataclasses.replace(record, state=INFEASIBLE, reason=candidate.reason)
    return record


def reuse(record: TrialRecord, same: TrialRecord) -> TrialRecord:
    """Return the record of a candidate whose architecture is that of another trial."""
    return dataclasses.replace(
        record,
        state=DUPLICATE,
        duplicate_of=same.number,
        reason=f"the architecture of trial {same.number}, whose result ({same.state}) is reused",
        **{name: getattr(same, name) for name in _REUSED},
    )


def weigh(plan: Plan, record: TrialRecord, arch: Arch, measured: Mapping[str, Figure]) -> TrialRecord:
    """Add what is known before training: objectives that it does not change, and limits that are passed.

    A candidate that passes a limit is INFEASIBLE, and so is a preset, which is shown from its costs; with
    ``train_baselines="all"`` a preset is trained for comparison and cannot win. A measured figure that passes a limit
    while its interval does not keeps it, and the record says so. ``measured``: on this machine.
    """
    figures = {name: figure.value for name, figure in measured.items()}
    spread = {name: [figure.low, figure.high] for name, figure in measured.items()}
    state_bytes = record.cost["state_bytes"]
    shown: dict[str, float] = {}
    if plan.state_length is not None:
        state_bytes = shown["state_bytes"] = arch.cost(plan.state_length).state_bytes
    values = {**objectives.counted(record.cost, state_bytes), **figures}
    known = {name: bound for name, bound in plan.limits.items() if objectives.LIMITS[name] in values}
    marginal = objectives.within_spread(known, values, spread)
    violation = objectives.violation({name: known[name] for name in known if name not in marginal}, values)
    record = dataclasses.replace(
        record,
        objectives={name: values[name] for name in plan.objectives if name in values},
        figures={**shown, **figures},
        spread=spread,
        within_spread=marginal,
        violation=violation,
    )
    if violation is not None and record.preset is not None and plan.train_baselines != "all":
        return dataclasses.replace(
            record, state=INFEASIBLE, reason=f"{violation}, so it is listed with its costs and not trained"
        )
    if violation is not None and record.preset is None:
        return dataclasses.replace(record, state=INFEASIBLE, reason=violation, violation=None)
    return record


class TrialRun:
    """Trains one trial and decides at its rungs whether it goes on; :meth:`run` returns its final record."""

    def __init__(
        self,
        plan: Plan,
        history: History,
        record: TrialRecord,
        trainer: Trainer,
        *,
        look: Callable[[], None],
        note: Callable[[TrialRecord], None],
        on_eval: Callable[[Mapping[str, Any]], None],
    ) -> None:
        """``look`` brings the history up to date; ``note`` writes the record of the trial while it trains."""
        self.plan, self.history, self.record, self.trainer = plan, history, record, trainer
        self.look, self.note, self.show = look, note, on_eval
        self.known = objectives.known_of(record)
        before = trainer.measured(record.number)
        # At an evaluation that another one followed, whatever had to be decided was decided: it went on.
        self.decided = max([record.tokens, *before[:-1]])
        self.shown = max([record.tokens, *before])
        self.reached: dict[int, float] = {}

    def run(self, arch: Arch) -> TrialRecord:
        started = time.time()
        if self.plan.rate == "tuned" and self.record.lr is None:
            self._race(arch)
        resumed = trained_tokens(self.record.curve) if self.trainer.kept(self.record.number) else 0
        result = self.trainer.train(self.record, arch, self._on_eval)
        record = conclude(self.plan, self.record, result, time.time() - started)
        leg = [time.time(), max(0, trained_tokens(record.curve) - resumed)]
        return dataclasses.replace(record, legs=[*record.legs, leg], deaths=[])

    def _race(self, arch: Arch) -> None:
        """Give the trial its own learning rate, and note it with what the others cost."""
        lr, agreed = rates.start(self.history, self.record, self.plan.lr)
        first = self.plan.rungs[0]
        tried = [] if agreed else rates.race(lambda rate: self.trainer.try_rate(self.record, arch, rate, first), lr)
        leg = [time.time(), rates.losers_tokens(tried)]
        self.record = dataclasses.replace(
            self.record,
            lr=tried[0].lr if tried else lr,
            rates=[list(one) for one in tried],
            legs=[*self.record.legs, *([leg] if tried else [])],
        )
        self.note(self.record)

    def _on_eval(self, value: Eval) -> Action:
        entry = flat(value)
        tokens = value.tokens
        if tokens > self.shown:
            self.show(entry)
        if tokens not in self.plan.rungs[:-1]:
            return Action.CONTINUE
        values = objectives.of_eval(self.plan.objectives, self.known, entry)
        if len(values) == 1:
            self.reached[tokens] = next(iter(values.values()))
        if tokens <= self.decided:
            return Action.CONTINUE
        if self.plan.pruner == "halving" and self.record.preset is None:
            self.look()
            waits = not self.plan.promotion.goes_on(self.history, self.record.number, tokens, values)
            return Action.PAUSE if waits else Action.CONTINUE
        if self.plan.pruner == "hyperband":
            return self._hyperband()
        return Action.CONTINUE

    def _hyperband(self) -> Action:
        """Ask for presets, too: they enter the rungs that candidates are compared at, but train to the end."""
        self.look()
        number = self.record.number
        ends, marks = hyperband.stops(self.plan.view, self.history, number, self.reached, self.record.marks)
        self.record = dataclasses.replace(self.record, marks=marks)
        self.note(self.record)
        return Action.STOP if ends and self.record.preset is None else Action.CONTINUE


def conclude(plan: Plan, record: TrialRecord, result: TrainResult, seconds: float) -> TrialRecord:
    """Return the record of a training that has ended or waits."""
    state = _STATES[result.status]
    curve = [flat(value) for value in result.evals]
    last = result.evals[-1] if result.evals else None
    scored = last if state != FAIL else None
    reason = result.reason or None
    if state == PRUNED and last is not None:
        verb, why = "pruned", "others were better there"
        if result.status == "paused":
            verb, why = "paused", f"not among the best 1/{plan.reduction} there"
        reason = f"{verb} at {last.tokens:,} of {plan.rungs[-1]:,} tokens: {why}"
    known = objectives.known_of(record)
    tested: dict[str, Any] = {name: scored.aux.get(name) if scored else None for name in TEST_FIGURES}
    return dataclasses.replace(
        record,
        state=state,
        valid_loss=scored.valid_loss if scored else None,
        bits_per_byte=scored.bits_per_byte if scored else None,
        accuracy=scored.accuracy if scored else None,
        **tested,
        rungs=[[value.tokens, value.valid_loss] for value in result.evals if value.tokens in plan.rungs],
        curve=curve,
        objectives=objectives.of_eval(plan.objectives, known, curve[-1]) if scored else known,
        tokens=last.tokens if last else 0,
        seconds=last.seconds if last else seconds,
        tokens_per_second=result.tokens_per_second or None,
        reason=reason,
    )


def trained_tokens(curve: Sequence[Mapping[str, Any]]) -> int:
    """Return the training tokens that a curve has cost, those of the branches of schedule ``wsd`` included."""
    return round(max((entry.get("trained_tokens", entry["tokens"]) for entry in curve), default=0))


def died(plan: Plan, record: TrialRecord, progress: str) -> TrialRecord:
    """Return the record of a trial whose process has ended: one that never comes further fails in the end."""
    deaths = [*record.deaths, progress][-DEATHS:]
    if len(deaths) < DEATHS or len(set(deaths)) > 1:
        return dataclasses.replace(record, deaths=deaths)
    reason = f"its process died {DEATHS} times in a row at the same place; is the machine's memory too small?"
    return dataclasses.replace(record, state=FAIL, reason=reason, deaths=deaths)


def flat(value: Eval) -> dict[str, Any]:
    """Return an evaluation as one mapping of numbers, an entry of ``TrialRecord.curve``."""
    own = {name: getattr(value, name) for name in _EVAL}
    return {**own, **value.aux}


_EVAL = tuple(item.name for item in dataclasses.fields(Eval) if item.name != "aux")
