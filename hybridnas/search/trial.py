"""One trial: a drawn candidate becomes an architecture, is trained once, and leaves its record.

Optuna's trial is told what happened; ``trials/NNNN/result.json`` is the full story.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
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
from hybridnas.search.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    TrialRecord,
    write_record,
)
from hybridnas.search_spaces.space import Proposal, Scale, Space, reason_of
from hybridnas.train.loop import run as train_run
from hybridnas.train.records import Eval, TrainResult, read_evals

if TYPE_CHECKING:
    import optuna

    from hybridnas.data import Source
    from hybridnas.search.tracking import Tracker


@dataclass
class TrialContext:
    """What all trials of a study share."""

    config: SearchConfig
    space: Space
    scale: Scale
    source: Source
    tracker: Tracker
    target: int  # active parameters that candidates are matched to
    news: Callable[[str], None]


class TrialRun:
    """Runs one Optuna trial from proposal to record; call :meth:`run` once."""

    def __init__(self, context: TrialContext, trial: optuna.Trial, folder: Path) -> None:
        self.context = context
        self.trial = trial
        self.folder = folder
        self.baseline: str | None = trial.user_attrs.get("baseline")
        self.rungs = context.config.budget.rung_tokens(context.target)
        self.reported: dict[int, float] = dict(trial.study.trials[trial.number].intermediate_values)

    def run(self, earlier: Mapping[str, TrialRecord]) -> TrialRecord:
        """Propose, reuse or train, and write the record; ``earlier`` maps fingerprints to finished trials."""
        started = time.time()
        try:
            proposal = self._propose()
        except HybridNASError as error:
            return self._reject(error)
        record = self._describe(proposal)
        same = earlier.get(record.fingerprint)
        if same is not None:
            record = self._reuse(record, same)
            write_record(self.folder, record)
            return record
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "arch.json", proposal.arch.to_dict())
        self._start_tracking(record)
        result = self._train(proposal.arch)
        record = self._conclude(record, result, time.time() - started)
        write_record(self.folder, record)
        return record

    def _reject(self, error: HybridNASError) -> TrialRecord:
        self.trial.set_constraint("feasible", 1.0)
        record = TrialRecord(
            number=self.trial.number,
            state=INFEASIBLE,
            preset=self.baseline,
            choices=dict(self.trial.params),
            reason=reason_of(error),
        )
        write_record(self.folder, record)
        return record

    def _propose(self) -> Proposal:
        space, scale = self.context.space, self.context.scale
        if self.baseline is not None:
            return Proposal(space.baseline(self.baseline, scale), {}, self.baseline)
        return space.propose(self.trial, scale)

    def _describe(self, proposal: Proposal) -> TrialRecord:
        arch = proposal.arch
        cost = dataclasses.asdict(arch.cost(self.context.config.budget.seq_len))
        self.trial.set_user_attr("pattern", str(arch.pattern))
        self.trial.set_user_attr("fingerprint", arch.fingerprint())
        return TrialRecord(
            number=self.trial.number,
            state=RUNNING,
            pattern=str(arch.pattern),
            fingerprint=arch.fingerprint(),
            preset=self.baseline,
            choices=dict(proposal.choices),
            cost=cost,
            seed=self.context.config.seed,
        )

    def _reuse(self, record: TrialRecord, same: TrialRecord) -> TrialRecord:
        for tokens, loss in same.rungs:
            self._report(int(tokens), loss)
        self.trial.set_user_attr("duplicate_of", same.number)
        kept = ("valid_loss", "bits_per_byte", "accuracy", "rungs", "curve", "tokens", "tokens_per_second")
        return dataclasses.replace(
            record,
            state=DUPLICATE,
            duplicate_of=same.number,
            reason=f"the architecture of trial {same.number}, whose result ({same.state}) is reused",
            **{name: getattr(same, name) for name in kept},
        )

    def _train(self, arch: Arch) -> TrainResult:
        config = self.context.config
        try:
            return train_run(
                arch,
                self.context.source,
                config.budget.train_config(self.context.target, config.seed),
                folder=self.folder,
                device=config.device,
                on_eval=self._on_eval,
                progress=config.progress,
            )
        except (CheckpointError, DataError, KernelUnavailableError, OSError, TrainingError):
            raise  # a full disk, another process, data, machine: the next trial would meet it, too, so the search ends
        except Exception as error:  # what one architecture provokes costs that trial alone
            write_text(self.folder / "error.txt", traceback.format_exc())
            reason = f"{type(error).__name__}: {reason_of(error)} (see {self.folder / 'error.txt'})"
            return TrainResult("failed", reason, read_evals(self.folder), None, self.folder)

    def _on_eval(self, value: Eval) -> bool:
        """Tell Optuna and MLflow, and say whether the trial ends here; baselines always run to the end."""
        self._report(value.tokens, value.valid_loss)
        self.context.tracker.log_eval(self.trial.number, dataclasses.asdict(value), step=value.tokens)
        if value.tokens not in self.rungs[:-1]:
            return False
        prune = self.trial.should_prune()  # asked for a baseline, too: it enters the rung that others must beat
        return prune and self.baseline is None

    def _report(self, tokens: int, loss: float) -> None:
        if tokens not in self.reported:
            self.reported[tokens] = loss
            self.trial.report(loss, step=tokens)

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
        state = {"completed": COMPLETE, "stopped": PRUNED, "failed": FAIL}[result.status]
        last = result.evals[-1] if result.evals else None
        reason = result.reason or None
        if state == PRUNED and last is not None:
            reason = f"pruned at {last.tokens:,} of {self.rungs[-1]:,} tokens: others were better there"
        rungs: Sequence[Sequence[float]] = [[e.tokens, e.valid_loss] for e in result.evals if e.tokens in self.rungs]
        record = dataclasses.replace(
            record,
            state=state,
            valid_loss=last.valid_loss if last and state != FAIL else None,
            bits_per_byte=last.bits_per_byte if last and state != FAIL else None,
            accuracy=last.accuracy if last and state != FAIL else None,
            rungs=rungs,
            curve=[_flat(value) for value in result.evals],
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
