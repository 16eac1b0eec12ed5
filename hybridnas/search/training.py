"""Trials of a study that are trained on data: in their folders, with checkpoints, measured on this machine if asked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hybridnas.arch.arch import Arch
from hybridnas.files import write_json
from hybridnas.search import speeds
from hybridnas.search.config import SearchConfig
from hybridnas.search.history import TRAINED, History
from hybridnas.search.plan import Plan
from hybridnas.search.rates import Tried
from hybridnas.search.trial import flat, trained_tokens
from hybridnas.study.objectives import LIMITS, eligible, score
from hybridnas.study.records import ARCH, CONFIRM, TrialRecord, trial_folder
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, Callback, OnEval
from hybridnas.train.experiment import Cell, run_cell
from hybridnas.train.records import Eval, TrainResult, read_evals

if TYPE_CHECKING:
    from hybridnas.data import Source
    from hybridnas.search.latency import Figure, Meter

RATES = "rates"  # in a trial's folder: the runs of its race
KEPT_CHECKPOINTS = 3  # of the best trials besides the presets; others come back through replay


class Wanted(NamedTuple):
    """A trial's architecture to be trained again in a confirmation."""

    record: Mapping[str, Any]  # of the trial
    seed: int | None  # None: with the search's seed, to find its own learning rate
    what: str  # for people: what it is for

    @property
    def trial(self) -> TrialRecord:
        """The trial's record."""
        return TrialRecord.from_dict(self.record)


class CellTrainer:
    """Trains the trials of one study, each in ``STUDY/trials/NNNN``."""

    def __init__(
        self,
        study: Path,
        config: SearchConfig,
        source: Source,
        target: int,
        callbacks: Sequence[Callback] = (),
        meter: Meter | None = None,
    ) -> None:
        """``target``: active parameters that candidates are matched to. ``callbacks`` watch every training.

        ``meter``: measures speeds, where the search wants any.
        """
        self.meter = meter
        self.study, self.config, self.source, self.target = study, config, source, target
        self.callbacks = tuple(callbacks)
        self._bare: dict[int, TrialRecord] = {}  # trials whose checkpoints were deleted, as their records were then

    def folder(self, number: int) -> Path:
        return trial_folder(self.study, number)

    def measured(self, number: int) -> Sequence[int]:
        return [value.tokens for value in read_evals(self.folder(number))]

    def kept(self, number: int) -> bool:
        return (self.folder(number) / checkpoint.NEWEST).exists()

    def progress(self, number: int) -> str:
        marks = []
        for name in ("metrics.jsonl", checkpoint.NEWEST):
            try:
                found = (self.folder(number) / name).stat()
                marks.append(f"{found.st_size}:{found.st_mtime_ns}")
            except OSError:
                marks.append("-")
        return " ".join(marks)

    def figures(self, arch: Arch) -> Mapping[str, Figure]:
        from hybridnas.search.latency import Setting, measure

        assert self.meter is not None
        return measure(self.study, arch, Setting.of(self.config), self.meter)

    def try_rate(self, record: TrialRecord, arch: Arch, lr: float, tokens: int) -> Tried:
        folder = self.folder(record.number) / RATES / f"{lr:.4g}"
        pause = OnEval(lambda value: Action.PAUSE if value.tokens >= tokens else Action.CONTINUE)
        with self._quiet():
            result = run_cell(self._cell(arch, folder, record.seed, lr=lr), callbacks=[pause, *self.callbacks])
        spent = trained_tokens([flat(value) for value in result.evals])
        loss = math.inf if result.status == "failed" or result.valid_loss is None else result.valid_loss
        return Tried(lr, loss, spent)

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        folder = self.folder(record.number)
        if not (folder / ARCH).exists():
            write_json(folder / ARCH, arch.to_dict())
        if record.lr is not None and (folder / RATES).is_dir():
            _take_over(folder / RATES / f"{record.lr:.4g}", folder)
        with self._quiet():
            cell = self._cell(arch, folder, record.seed, lr=record.lr)
            return run_cell(cell, callbacks=[OnEval(on_eval), *self.callbacks])

    def _quiet(self) -> AbstractContextManager[None]:
        """Return what keeps trainings from running while another worker measures this machine's speed."""
        if not self.config.hardware:
            return nullcontext()
        from hybridnas.search.latency import training

        return training(self.study)

    def again(self, record: TrialRecord, folder: Path, seed: int, lr: float | None = None) -> TrainResult:
        """Train a recorded trial's architecture with another seed at full length; its weights are not kept.

        ``folder``: of the trial, whose architecture lies there. ``lr``: another rate; None: the trial's own.
        """
        arch = Arch.from_dict(json.loads((folder / ARCH).read_text(encoding="utf-8")))
        place = folder / CONFIRM / (f"seed{seed}" if lr is None else f"rate{lr:.4g}")
        cell = self._cell(arch, place, seed, keep=False, lr=lr or record.own_lr or record.lr)
        return run_cell(cell, callbacks=self.callbacks)

    def _cell(self, arch: Arch, folder: Path, seed: int, *, keep: bool = True, lr: float | None = None) -> Cell:
        config = self.config.budget.train_config(self.target, seed)
        return Cell(
            key=folder.name,
            model=arch,
            source=self.source,
            config=config if lr is None else config.replace(lr=lr),
            folder=folder,
            device=self.config.device,
            keep_checkpoint=keep,
        )

    def tidy(self, plan: Plan, history: History) -> None:
        """Keep the weights of presets, of the best few, and of paused candidates that may yet go on.

        Disks are finite; replay brings any back, and a candidate that goes on without its checkpoint is trained again.
        """
        if self.config.hardware:
            speeds.write(self.study, history, {LIMITS[name] for name in speeds.measured_limits(plan.limits)})
        ranked = sorted(filter(eligible, history.values()), key=lambda record: (score(record), record.number))
        kept = max(KEPT_CHECKPOINTS, self.config.budget.confirm_top, self.config.budget.screened)
        keep = {record.number for record in ranked[:kept]} | history.running
        keep |= {record.number for record in history.values() if record.preset}
        if plan.pruner == "halving":
            keep |= set(plan.promotion.may_return(history))
        for record in history.values():
            number = record.number
            if record.state in TRAINED and number not in keep and self._bare.get(number) is not record:
                for path in self.folder(number).glob("checkpoint*"):
                    path.unlink(missing_ok=True)
                self._bare[number] = record


def _take_over(run: Path, folder: Path) -> None:
    """Make the winner of a race the trial's own run, file by file, and delete the others; safe to be repeated."""
    for path in sorted(run.glob("*")):
        if path.name != ".lock":
            path.replace(folder / path.name)
    shutil.rmtree(run.parent)
