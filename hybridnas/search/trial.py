"""One trial: a drawn candidate becomes an architecture, is trained once, and leaves its record.

Optuna's trial is told what happened; ``trials/NNNN/result.json`` is the full story.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.arch.arch import Arch
from hybridnas.errors import (
    CheckpointError,
    DataError,
    HybridNASError,
    KernelUnavailableError,
    TrainingError,
)
from hybridnas.files import write_json, write_text
from hybridnas.search.config import SearchConfig
from hybridnas.search.pruning.promotion import Ladder, candidate_of
from hybridnas.search_spaces.space import Proposal, Scale, Space, reason_of
from hybridnas.study import objectives
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    TrialRecord,
    write_record,
)
from hybridnas.tabular.table import TableSource
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, OnEval
from hybridnas.train.loop import run as train_run
from hybridnas.train.records import Eval, TrainResult, read_evals

if TYPE_CHECKING:
    import optuna

    from hybridnas.data import Source
    from hybridnas.tracking.tracker import BackgroundTracker


@dataclass
class TrialContext:
    """What all trials of a study share."""

    config: SearchConfig
    space: Space
    scale: Scale
    source: Source
    tracker: BackgroundTracker
    target: int  # active parameters that candidates are matched to
    news: Callable[[str], None]
    records: Callable[[], Collection[TrialRecord]] = tuple  # what is finished by now, by all workers

    @property
    def ladder(self) -> Ladder | None:
        """Who goes on past which rung, where the pruner is halving."""
        return Ladder.of(self.config, self.target)


class TrialRun:
    """Runs one Optuna trial from proposal to record; call :meth:`run` once."""

    def __init__(self, context: TrialContext, trial: optuna.Trial, folder: Path) -> None:
        self.context = context
        self.trial = trial
        self.folder = folder
        self.number = candidate_of(trial)
        self.baseline: str | None = trial.user_attrs.get("baseline")
        self.rungs = context.config.budget.rung_tokens(context.target)
        self.ladder = context.ladder
        self.known: dict[str, float] = {}  # objectives that training does not change
        self.before = 0  # training tokens up to which the record stood when the candidate was taken up again
        self.passed = 0  # training tokens at which whatever had to be decided was decided before
        self.reported: set[int] = set(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def run(self, earlier: Mapping[str, TrialRecord]) -> TrialRecord:
        """Propose, reuse or train, and write the record; ``earlier`` maps fingerprints to finished trials."""
        started = time.time()
        try:
            proposal = self._propose()
        except HybridNASError as error:
            return self._reject(reason_of(error), {"feasible": 1.0})
        record = self._describe(proposal)
        same = earlier.get(record.fingerprint)
        if same is not None:
            record = self._reuse(record, same)
            write_record(self.folder, record)
            return record
        record = self._weigh(record, proposal.arch)
        if record.violation is not None and self.baseline is None:
            return self._reject(record.violation, {}, record)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "arch.json", proposal.arch.to_dict())
        return self._train_and_write(record, proposal.arch, started)

    def go_on(self, record: TrialRecord) -> TrialRecord:
        """Take up a paused candidate where its checkpoint stands, and let its record grow."""
        started = time.time()
        arch = self._propose().arch
        self.known = objectives.known_of(record)
        self.before = self.passed = record.tokens
        if not self._kept():
            self.context.news(f"trial {self.number}: its checkpoint is gone, so it is trained again from nothing")
        return self._train_and_write(record, arch, started)

    def _train_and_write(self, record: TrialRecord, arch: Arch, started: float) -> TrialRecord:
        measured = read_evals(self.folder)
        self.passed = max([self.passed, *(value.tokens for value in measured[:-1])])  # a later one says: it went on
        resumed = record.tokens if self._kept() else 0
        self._start_tracking(record)
        result = self._train(arch)
        record = self._conclude(record, result, time.time() - started)
        leg = [time.time(), max(0, record.tokens - resumed)]
        record = dataclasses.replace(record, legs=[*record.legs, leg])
        write_record(self.folder, record)
        return record

    def _reject(self, reason: str, constraints: Mapping[str, float], record: TrialRecord | None = None) -> TrialRecord:
        for name, value in constraints.items():
            self.trial.set_constraint(name, value)
        empty = TrialRecord(number=self.number, state=INFEASIBLE, preset=self.baseline, choices=dict(self.trial.params))
        record = dataclasses.replace(record or empty, state=INFEASIBLE, reason=reason, violation=None)
        write_record(self.folder, record)
        return record

    def _propose(self) -> Proposal:
        space, scale = self.context.space, self.context.scale
        if self.baseline is not None:
            proposal = Proposal(space.baseline(self.baseline, scale), {}, self.baseline)
        else:
            proposal = space.propose(self.trial, scale)
        if isinstance(self.context.source, TableSource):
            self.context.source.require(proposal.arch)
        return proposal

    def _describe(self, proposal: Proposal) -> TrialRecord:
        arch = proposal.arch
        cost = dataclasses.asdict(arch.cost(self.context.config.budget.seq_len))
        self.trial.set_user_attr("pattern", str(arch.pattern))
        self.trial.set_user_attr("fingerprint", arch.fingerprint())
        return TrialRecord(
            number=self.number,
            state=RUNNING,
            pattern=str(arch.pattern),
            fingerprint=arch.fingerprint(),
            preset=self.baseline,
            choices=dict(proposal.choices),
            cost=cost,
            seed=self.context.config.seed,
        )

    def _weigh(self, record: TrialRecord, arch: Arch) -> TrialRecord:
        """Add what is known before training: the objectives that it does not change, and which limits are passed."""
        config = self.context.config
        length = config.state_length or config.budget.seq_len
        values = objectives.counted(record.cost, arch.cost(length).state_bytes)
        figures = {"state_bytes": values["state_bytes"]} if config.state_length else {}
        if objectives.wants_hardware(config):
            from hybridnas.search.latency import measure

            figures |= (measured := measure(self.folder.parent.parent, arch, config))
            values |= measured
        for name, amount in objectives.excess(config, values).items():
            self.trial.set_constraint(name, amount)
        self.known = {name: values[name] for name in config.objectives if name in values}
        return dataclasses.replace(
            record, objectives=self.known, figures=figures, violation=objectives.violation(config, values)
        )

    def _reuse(self, record: TrialRecord, same: TrialRecord) -> TrialRecord:
        self.known = objectives.known_of(same)
        for entry in same.curve:
            if entry.get("tokens") in self.rungs:
                self._report(int(entry["tokens"]), self._values(entry))
        self.trial.set_user_attr("duplicate_of", same.number)
        kept = [
            *("valid_loss", "bits_per_byte", "accuracy", "rungs", "curve", "tokens", "tokens_per_second"),
            *("objectives", "figures", "violation"),
        ]
        return dataclasses.replace(
            record,
            state=DUPLICATE,
            duplicate_of=same.number,
            reason=f"the architecture of trial {same.number}, whose result ({same.state}) is reused",
            **{name: getattr(same, name) for name in kept},
        )

    def _kept(self) -> bool:
        """Whether what was trained of this candidate still stands; a table never forgets."""
        return isinstance(self.context.source, TableSource) or (self.folder / checkpoint.NEWEST).exists()

    def _train(self, arch: Arch) -> TrainResult:
        config = self.context.config
        if isinstance(self.context.source, TableSource):
            return self.context.source.look_up(arch, self.rungs, self.folder, self._on_eval)
        quiet: AbstractContextManager[None] = nullcontext()
        if objectives.wants_hardware(config):
            from hybridnas.search.latency import training

            quiet = training(self.folder.parent.parent)
        try:
            with quiet:
                return train_run(
                    arch,
                    self.context.source,
                    config.budget.train_config(self.context.target, config.seed),
                    folder=self.folder,
                    device=config.device,
                    callbacks=[OnEval(self._on_eval)],
                )
        except (CheckpointError, DataError, KernelUnavailableError, OSError, TrainingError):
            raise  # a full disk, another process, data, machine: the next trial would meet it, too, so the search ends
        except Exception as error:  # what one architecture provokes costs that trial alone
            write_text(self.folder / "error.txt", traceback.format_exc())
            reason = f"{type(error).__name__}: {reason_of(error)} (see {self.folder / 'error.txt'})"
            return TrainResult("failed", reason, read_evals(self.folder), None, self.folder)

    def _on_eval(self, value: Eval) -> Action:
        """Tell Optuna and MLflow, and say whether the trial ends or waits here; baselines always run to the end."""
        values = self._values({"valid_loss": value.valid_loss, "accuracy": value.accuracy})
        self._report(value.tokens, values)
        if value.tokens > self.before:
            self.context.tracker.log_eval(self.number, dataclasses.asdict(value))
        if value.tokens <= self.passed or value.tokens not in self.rungs[:-1]:
            return Action.CONTINUE
        if self.ladder is not None:
            waits = not self.ladder.goes_on(self.context.records(), self.number, value.tokens, values)
            return Action.PAUSE if waits and self.baseline is None else Action.CONTINUE
        if len(values) > 1:
            return Action.CONTINUE
        prune = self.trial.should_prune()  # asked for a baseline, too: it enters the rung that others must beat
        return Action.STOP if prune and self.baseline is None else Action.CONTINUE

    def _values(self, entry: Mapping[str, Any]) -> dict[str, float]:
        return objectives.of_eval(self.context.config.objectives, self.known, entry)

    def _report(self, tokens: int, values: Mapping[str, float]) -> None:
        """Give Optuna the values at a rung; where it takes no report, of several objectives, as a user attribute."""
        if tokens in self.reported:
            return
        self.reported.add(tokens)
        if len(values) == 1:
            self.trial.report(next(iter(values.values())), step=tokens)
        elif tokens in self.rungs:
            self.trial.set_user_attr(f"rung_{tokens}", dict(values))

    def _start_tracking(self, record: TrialRecord) -> None:
        parameters = {
            "pattern": record.pattern,
            "fingerprint": record.fingerprint[:12],
            "d_model": self.context.scale.d_model,
            "seed": record.seed,
            **{name: record.cost[name] for name in ("params", "active_params", "state_bytes", "flops_per_token")},
            **{f"choice.{name}": value for name, value in record.choices.items()},
        }
        tags = {"pattern": record.pattern, "fingerprint": record.fingerprint, "preset": record.preset}
        self.context.tracker.start_trial(record.number, parameters, {k: v for k, v in tags.items() if v})

    def _conclude(self, record: TrialRecord, result: TrainResult, seconds: float) -> TrialRecord:
        state = {"completed": COMPLETE, "stopped": PRUNED, "paused": PRUNED, "failed": FAIL}[result.status]
        last = result.evals[-1] if result.evals else None
        reason = result.reason or None
        if state == PRUNED and last is not None:
            reason = f"pruned at {last.tokens:,} of {self.rungs[-1]:,} tokens: others were better there"
        if result.status == "paused" and last is not None and self.ladder is not None:
            share = f"not among the best 1/{self.ladder.reduction} there"
            reason = f"paused at {last.tokens:,} of {self.rungs[-1]:,} tokens: {share}"
        rungs: Sequence[Sequence[float]] = [[e.tokens, e.valid_loss] for e in result.evals if e.tokens in self.rungs]
        curve = [_flat(value) for value in result.evals]
        record = dataclasses.replace(
            record,
            state=state,
            valid_loss=last.valid_loss if last and state != FAIL else None,
            bits_per_byte=last.bits_per_byte if last and state != FAIL else None,
            accuracy=last.accuracy if last and state != FAIL else None,
            rungs=rungs,
            curve=curve,
            objectives=self._values(curve[-1]) if curve and state != FAIL else self.known,
            tokens=last.tokens if last else 0,
            seconds=last.seconds if last else seconds,
            tokens_per_second=result.tokens_per_second or None,
            reason=reason,
        )
        self.context.tracker.end_trial(record.number, record.state, record, [self.folder / "arch.json"])
        return record


def _flat(value: Eval) -> dict[str, Any]:
    plain = dataclasses.asdict(value)
    return {**{k: v for k, v in plain.items() if k != "aux"}, **plain["aux"]}
