"""Builds the table of a space: every architecture trained, the best quarter with further seeds, in pieces that resume.

Each training is a cell of an :class:`hybridnas.train.experiment.Experiment`. Ended at any moment, the same call goes
on; ``part=(0, 2)`` and ``part=(1, 2)`` are two processes that write one table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybridnas.arch.arch import Arch
from hybridnas.data import Source, open_source, source_config
from hybridnas.errors import MatchError
from hybridnas.files import locked
from hybridnas.search.sampling.candidates import Fixed
from hybridnas.search.table import Row, Table, TableSpec
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.train.callbacks import Callback, Run
from hybridnas.train.experiment import Cell, CellResult, Experiment
from hybridnas.train.records import Eval, TrainResult

_WORK = Path("runs") / "table"  # where unfinished trainings lie
log = logging.getLogger("hybridnas.tabular")


class Wanted(NamedTuple):
    """An architecture of the space and the choices that lead to it."""

    arch: Arch
    choices: dict[str, Any]


def architectures(space: Space, scale: Scale) -> list[Wanted]:
    """Return every distinct architecture that the space can draw, in an order that is random and always the same.

    So any beginning of the table is a fair sample of the space.
    """
    found: dict[str, Wanted] = {}
    for choices in every_choice(space, scale):
        with contextlib.suppress(MatchError):
            proposal = space.propose(Fixed(choices), scale)
            found.setdefault(proposal.arch.fingerprint(), Wanted(proposal.arch, choices))
    wanted = list(found.values())
    random.Random(0).shuffle(wanted)
    return wanted


def build(
    space: Space,
    *,
    part: tuple[int, int] = (0, 1),
    minutes: float | None = None,
    report: Callable[[str], None] | None = None,
    work: Path = _WORK,
    origin: Mapping[str, str] | None = None,
) -> Table:
    """Train what the table lacks of this part, each result written at once; returns the table as it then is.

    ``minutes``: no training starts that would probably end later. ``origin``: ``command`` and ``commit`` of each new
    row. Raises StudyError for a table of other settings.
    """
    builder = _Builder(space, part, work, report or (lambda text: log.info("%s", text)), dict(origin or {}))
    return builder.run(minutes)


class _CpuTime(Callback):
    """Measures the processor time of a training [s]."""

    seconds = 0.0

    def on_start(self, run: Run) -> None:
        self._began = time.process_time()

    def on_end(self, run: Run, result: TrainResult) -> None:
        self.seconds = time.process_time() - self._began


class _Builder:
    """One process at a table."""

    def __init__(
        self,
        space: Space,
        part: tuple[int, int],
        work: Path,
        report: Callable[[str], None],
        origin: dict[str, str],
    ) -> None:
        self.space, self.part, self.work, self.report = space, part, work, report
        self.origin = {"command": "", "commit": "unknown", **origin}
        self.spec = TableSpec.of(space)
        self.path = self.spec.file()
        self.source: Source = open_source(source_config(self.spec.data))
        self.scale = self.spec.budget.scale(self.source.vocab_size)
        space.check(self.scale)
        self.target = space.target(self.scale)
        self.points = self.spec.points(self.target)
        self.wanted = architectures(space, self.scale)

    def run(self, minutes: float | None) -> Table:
        table = self._read()
        tokens = self.spec.budget.rung_tokens(self.target)[-1]  # raises early where the rungs cannot be met
        self.report(
            f"{len(self.wanted)} architectures of {self.target:,} active parameters, each trained on "
            f"{tokens:,} tokens of {self.source.describe()}; {len(table.rows)} runs are in {self.path}"
        )
        experiment = Experiment(self._cells(), minutes=minutes, whole_cells=True, on_result=self._keep)
        experiment.run()
        if not experiment.complete:
            self.report("the minutes are used; the same command goes on")
        return self._read()

    def _cells(self) -> Iterator[Cell]:
        """Yield every architecture of this part once, then those of the best quarter with further seeds."""
        for wanted in self.wanted[self.part[0] :: self.part[1]]:
            yield from self._missing(wanted, [0])
        table = self._read()
        if len(table.by_fingerprint) < len(self.wanted):
            missing = len(self.wanted) - len(table.by_fingerprint)
            self.report(f"{missing} architectures of other parts are not there yet; further seeds follow when they are")
            return
        ranked = sorted(table.firsts(), key=lambda row: row.score)
        best = {row.fingerprint for row in ranked[: math.ceil(len(ranked) / 4)]}
        for wanted in self.wanted[self.part[0] :: self.part[1]]:
            if wanted.arch.fingerprint() in best:
                yield from self._missing(wanted, range(1, self.spec.seeds))

    def _missing(self, wanted: Wanted, seeds: Iterable[int]) -> Iterator[Cell]:
        fingerprint = wanted.arch.fingerprint()
        for seed in seeds:
            if any(row.seed == seed for row in self._read().by_fingerprint.get(fingerprint, [])):
                continue
            name = f"{self.space.name}-{wanted.arch.short}-{seed}"
            used = _CpuTime()
            yield Cell(
                key=name,
                model=wanted.arch,
                source=self.source,
                config=self.spec.budget.train_config(self.target, seed).replace(eval_at=self.points),
                folder=self.work / name,
                device="cpu",
                keep_checkpoint=False,
                callbacks=(used,),
                facts={"wanted": wanted, "cpu": used},
            )

    def _read(self) -> Table:
        return Table.read(self.path) if self.path.exists() else Table([], self.path)

    def _keep(self, ended: CellResult) -> None:
        """Put a result into the file, which other parts write, too."""
        row = self._row(ended)
        with locked(self.work / f"{self.space.name}.lock"):
            table = Table([*self._read().rows, row], self.path)
            table.write()
        if ended.cell.folder is not None:
            shutil.rmtree(ended.cell.folder, ignore_errors=True)
        how = f"failed: {row.failed}" if row.failed else f"loss {row.score:.4f}"
        self.report(
            f"{len(table.rows):4} runs  {row.pattern:8} seed {row.seed}  {row.cpu_seconds:.1f} core-seconds  {how}"
        )

    def _row(self, ended: CellResult) -> Row:
        wanted: Wanted = ended.cell.facts["wanted"]
        arch, done = wanted.arch, ended.result
        return Row(
            pattern=str(arch.pattern),
            fingerprint=arch.fingerprint(),
            vocab_size=arch.vocab_size,
            choices=wanted.choices,
            seed=ended.cell.config.seed,
            cost=dataclasses.asdict(arch.cost(self.spec.budget.seq_len)),
            tokens=done.evals[-1].tokens if done.evals else 0,
            losses={value.tokens: value.valid_loss for value in done.evals},
            accuracies={value.tokens: value.accuracy for value in done.evals},
            parts=_parts(done.evals),
            tokens_per_second=round(done.tokens_per_second),
            seconds=round(done.evals[-1].seconds, 2) if done.evals else 0.0,
            cpu_seconds=round(ended.cell.facts["cpu"].seconds, 2),
            settings=self.spec.settings(self.space),
            data=self.source.fingerprint[:12],
            failed=done.reason if done.status != "completed" else "",
            **self.origin,
        )


def _parts(evals: list[Eval]) -> dict[str, float]:
    last = evals[-1].aux if evals else {}
    return {name: value for name, value in last.items() if name.startswith(("loss.", "accuracy."))}


def tiny_table() -> Table:
    """Build a table of four architectures in a temporary folder and return it."""
    with tempfile.TemporaryDirectory() as folder:
        budget = {
            **{"d_model": 8, "depth": 2, "n_experts": 2, "multiple": 1, "seq_len": 16, "batch_size": 2},
            **{"tokens_per_active_param": 0.1, "rungs": 2, "reduction": 2, "valid_tokens": 64},
        }
        spec = {"path": f"{folder}/t.csv", "data": {"kind": "stdlib", "max_bytes": 100_000}, "budget": budget}
        space = {"name": "tiny", "letters": ["M", "F"], "motif_length": [2], "baselines": [], "table": spec}
        return build(Space.from_mapping(space), work=Path(folder))
