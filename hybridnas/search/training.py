"""Trials of a study that are trained on data: in their folders, with checkpoints, measured on this machine if asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.arch.arch import Arch
from hybridnas.files import write_json
from hybridnas.search.config import SearchConfig
from hybridnas.search.history import TRAINED, History
from hybridnas.search.plan import Plan
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import ARCH, TrialRecord, trial_folder
from hybridnas.train import checkpoint
from hybridnas.train.callbacks import Action, Callback, OnEval
from hybridnas.train.experiment import Cell, run_cell
from hybridnas.train.records import Eval, TrainResult, read_evals

if TYPE_CHECKING:
    from hybridnas.data import Source

KEPT_CHECKPOINTS = 3  # of the best trials besides the presets; others come back through replay


class CellTrainer:
    """Trains the trials of one study, each in ``STUDY/trials/NNNN``."""

    def __init__(
        self, study: Path, config: SearchConfig, source: Source, target: int, callbacks: Sequence[Callback] = ()
    ) -> None:
        """``target``: active parameters that candidates are matched to. ``callbacks`` watch every training."""
        self.study, self.config, self.source, self.target = study, config, source, target
        self.callbacks = tuple(callbacks)

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

    def figures(self, arch: Arch) -> dict[str, float]:
        from hybridnas.search.latency import measure

        return measure(self.study, arch, self.config)

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        folder = self.folder(record.number)
        if not (folder / ARCH).exists():
            write_json(folder / ARCH, arch.to_dict())
        quiet: AbstractContextManager[None] = nullcontext()
        if self.config.hardware:
            from hybridnas.search.latency import training

            quiet = training(self.study)
        with quiet:
            return run_cell(self._cell(arch, folder, record.seed), callbacks=[OnEval(on_eval), *self.callbacks])

    def again(self, record: TrialRecord, folder: Path, seed: int) -> TrainResult:
        """Train a recorded trial's architecture with another seed at full length; its weights are not kept.

        ``folder``: of the trial, whose architecture lies there.
        """
        arch = Arch.from_dict(json.loads((folder / ARCH).read_text(encoding="utf-8")))
        cell = self._cell(arch, folder / "confirm" / f"seed{seed}", seed, keep=False)
        return run_cell(cell, callbacks=self.callbacks)

    def _cell(self, arch: Arch, folder: Path, seed: int, *, keep: bool = True) -> Cell:
        return Cell(
            key=folder.name,
            model=arch,
            source=self.source,
            config=self.config.budget.train_config(self.target, seed),
            folder=folder,
            device=self.config.device,
            keep_checkpoint=keep,
        )

    def tidy(self, plan: Plan, history: History) -> None:
        """Keep the weights of presets, of the best few, and of paused candidates that may yet go on.

        Disks are finite; replay brings any back, and a candidate that goes on without its checkpoint is trained again.
        """
        ranked = sorted(filter(eligible, history.values()), key=lambda record: (score(record), record.number))
        kept = max(KEPT_CHECKPOINTS, self.config.budget.confirm_top)
        keep = {record.number for record in ranked[:kept]} | history.running
        keep |= {record.number for record in history.values() if record.preset}
        if plan.pruner == "halving":
            keep |= set(plan.promotion.may_return(history))
        for record in history.values():
            if record.state in TRAINED and record.number not in keep:
                for path in self.folder(record.number).glob("checkpoint*"):
                    path.unlink(missing_ok=True)
