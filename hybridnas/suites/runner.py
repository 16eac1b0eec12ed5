"""The one runner of all suites: trains every architecture on every task, again and again the same call until done.

Each training is a run folder of its own under RUNS/SUITE, so an interrupted suite goes on where it stopped: within a
run, too. The first seed tries the whole grid; the other seeds repeat the best setting that it found.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.files import write_json
from hybridnas.suites import results
from hybridnas.suites.results import CurveRow, LengthRow, Row
from hybridnas.suites.suite import Entry, Suite, Task
from hybridnas.tracking.mlflow import open_tracker
from hybridnas.tracking.tracker import BackgroundTracker
from hybridnas.units import human

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.data.source import Source
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.records import Eval, TrainResult

News = Callable[[str], None]
_RUN_NUMBERS = "numbers.json"  # folder -> number of the run in MLflow


@dataclass(frozen=True)
class Cell:
    """One training to do."""

    entry: Entry
    task: Task
    arch: Arch
    source: Source
    config: TrainConfig
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """What a call left: all rows so far, rows of lengths, and whether everything that was asked for is done."""

    rows: list[Row]
    lengths: list[LengthRow]
    curves: list[CurveRow]
    done: bool


class Runner:
    """Runs a suite; :meth:`run` may be called again, by another process, to go on."""

    def __init__(
        self,
        suite: Suite,
        entries: Sequence[Entry],
        *,
        folder: Path,
        out: Path,
        quick: bool = False,
        device: str = "auto",
        tracking: str | None = None,
        minutes: float | None = None,
        news: News | None = None,
    ) -> None:
        self.suite = suite
        self.entries = tuple(entries)
        self.folder = folder
        # The issue of a suite is its main CSV: accuracy by length, where that is what it asks.
        by_length = suite.figure == "lengths"
        self.rows_path = results.beside(out, "runs") if by_length else out
        self.lengths_path = out if by_length else results.beside(out, "lengths")
        self.curves_path = results.beside(out, "curves")
        self.quick = quick
        self.device = device
        self.tracking = tracking
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.news = news or (lambda text: None)
        self.rows = results.read_rows(self.rows_path, suite)
        self.lengths = results.read_lengths(self.lengths_path)
        self.curves = results.read_curves(self.curves_path)
        self._sources: dict[str, Source] = {}
        self._visited = 0

    @property
    def total(self) -> int:
        """How many trainings the suite asks for: the grid with the first seed, the best setting with the others."""
        return sum(
            len(entry.rates or self.suite.rates) * len(self.suite.decays) + len(entry.seeds or self.suite.seeds) - 1
            for _, entry in self._groups()
        )

    def run(self) -> Outcome:
        """Train what is missing, writing the CSV after every run; returns what is there when it ends or time is up."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"suite": self.suite.name, "quick": self.quick, "score": self.suite.score}
        with open_tracker(self.tracking, self.folder, self.folder.name, about) as tracker:
            done = all(self._group(entry, task, tracker) for task, entry in self._groups())
        chosen = {row.folder for row in results.choose(self.rows, self.suite) if row.chosen}
        return Outcome(self.rows, [row for row in self.lengths if row.folder in chosen], self.curves, done)

    def _groups(self) -> Iterator[tuple[Task, Entry]]:
        return ((task, entry) for task in self.suite.tasks for entry in self.entries if entry.learns(task))

    def cells(self, entry: Entry, task: Task) -> Iterator[Cell]:
        """Yield the trainings of one architecture on one task; those of later seeds once the grid has been tried."""
        first, *others = entry.seeds or self.suite.seeds
        for rate in entry.rates or self.suite.rates:
            for decay in self.suite.decays:
                yield self._cell(entry, task, rate, decay, first)
        if others:
            own = [row for row in self.rows if (row.model, row.task) == (entry.name, task.name)]
            best = results.best_setting(own, self.suite)
            if best is not None:
                yield from (self._cell(entry, task, *best, seed) for seed in others)

    def _group(self, entry: Entry, task: Task, tracker: BackgroundTracker) -> bool:
        """Run one architecture on one task; returns False when the time is up."""
        for cell in self.cells(entry, task):
            self._visited += 1
            if self._known(cell) is None and not self._train(cell, tracker):
                return False
        return not task.lengths or self._measure_lengths(entry, task)

    def _known(self, cell: Cell) -> Row | None:
        config = cell.config
        key = (cell.arch.fingerprint(), cell.task.digest, cell.task.name, config.lr, config.weight_decay, config.seed)
        return next((row for row in self.rows if row.key == key), None)

    def _cell(self, entry: Entry, task: Task, rate: float, decay: float, seed: int) -> Cell:
        from hybridnas.train.config import TrainConfig
        from hybridnas.train.loop import identity

        source = self.source(task)
        arch = entry.arch(source.vocab_size)
        fields = {**task.train, "lr": rate, "weight_decay": decay, "seed": seed}
        if task.tokens_per_active is not None:
            fields["tokens"] = round(task.tokens_per_active * arch.cost().active_params)
        if task.measurements:
            fields["eval_at"] = even_points(fields["tokens"], task.measurements)
        config = TrainConfig.from_dict(fields)
        said = json.dumps(identity(arch, source, config), sort_keys=True)
        name = f"lr{rate:g}-wd{decay:g}-seed{seed}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
        return Cell(entry, task, arch, source, config, self.folder / _slug(entry.name) / _slug(task.name) / name)

    def source(self, task: Task) -> Source:
        """Open a task's data, once."""
        from hybridnas.data import open_source, source_config

        if task.digest not in self._sources:
            self._sources[task.digest] = open_source(source_config(task.data))
        return self._sources[task.digest]

    def _train(self, cell: Cell, tracker: BackgroundTracker) -> bool:
        from hybridnas.train.callbacks import StopAtAccuracy
        from hybridnas.train.loop import run as train
        from hybridnas.train.tracking import Tracking

        left = None if self.until is None else self.until - time.monotonic()
        if left is not None and left <= 0:
            return False
        number = self._number(cell.folder)
        tracking = Tracking(
            tracker=tracker,
            number=number,
            params={"model": cell.entry.name, "task": cell.task.name},
            tags={"preset": cell.entry.preset},
        )
        stop = [] if self.suite.stop_at is None else [StopAtAccuracy(self.suite.stop_at)]
        result = train(
            cell.arch,
            cell.source,
            cell.config,
            folder=cell.folder,
            device=self.device,
            callbacks=[tracking, *stop],
            keep_checkpoint=bool(cell.task.lengths),
            max_seconds=left,
        )
        if not result.final:
            return False
        row = self._row(cell, result)
        # Read again: another process may have trained other architectures of this suite in the meantime.
        own, others = results.split_rows(self.rows_path, self.suite)
        self.rows = results.choose(results.merged(own, *self.rows, row), self.suite)
        results.write_rows(self.rows_path, [*self.rows, *others])
        self._keep_curve(row, result.evals)
        self.news(f"[{self._visited}/{self.total}] {_told(row)}")
        return True

    def _row(self, cell: Cell, result: TrainResult) -> Row:
        cost = cell.arch.cost(cell.config.seq_len)
        last = result.evals[-1] if result.evals else None
        return Row(
            suite=self.suite.name,
            quick=self.quick,
            model=cell.entry.name,
            task=cell.task.name,
            column=cell.task.column,
            lr=cell.config.lr,
            weight_decay=cell.config.weight_decay,
            seed=cell.config.seed,
            status=result.status,
            score=None if last is None or result.status == "failed" else getattr(last, self.suite.score),
            accuracy=last.accuracy if last else None,
            valid_loss=last.valid_loss if last else None,
            train_loss=last.train_loss if last else None,
            tokens=last.tokens if last else 0,
            steps=last.step if last else 0,
            seconds=last.seconds if last else 0.0,
            tokens_per_second=result.tokens_per_second,
            pattern=str(cell.arch.pattern),
            fingerprint=cell.arch.fingerprint(),
            d_model=cell.arch.d_model,
            params=cost.params,
            active_params=cost.active_params,
            embedding_params=cost.embedding_params,
            state_bytes=cost.state_bytes,
            seq_len=cell.config.seq_len,
            settings=cell.task.digest,
            reason=result.reason if result.status == "failed" else "",
            folder=cell.folder.relative_to(self.folder).as_posix(),
        )

    def _keep_curve(self, row: Row, evals: Sequence[Eval]) -> None:
        about = {name: getattr(row, name) for name in ("model", "task", "lr", "weight_decay", "seed", "folder")}
        kept = [point for point in results.read_curves(self.curves_path) if point.folder != row.folder]
        for value in evals:
            figures = {name: getattr(value, name) for name in ("tokens", "valid_loss", "train_loss", "accuracy")}
            kept.append(CurveRow(**about, **figures))
        self.curves = kept
        results.write_rows(self.curves_path, kept)

    def _measure_lengths(self, entry: Entry, task: Task) -> bool:
        from hybridnas.suites.lengths import at_lengths
        from hybridnas.train.checkpoint import load_model

        for row in results.choose(self.rows, self.suite):
            if (row.model, row.task) != (entry.name, task.name) or not row.chosen:
                continue
            known = {(old.folder, old.length) for old in self.lengths}
            wanted = [length for length in task.lengths if (row.folder, length) not in known]
            if not wanted:
                continue
            model = load_model(self.folder / row.folder)
            measured = at_lengths(model, task.data, wanted, device=self.device, name=entry.name, seed=row.seed)
            for found in measured:
                named = {"task": task.name, "folder": row.folder}
                self.lengths = [*results.read_lengths(self.lengths_path), LengthRow(**{**asdict(found), **named})]
                results.write_rows(self.lengths_path, self.lengths)
                self.news(f"{entry.name}, seed {row.seed}, length {found.length:,}: {results.length_words(found)}")
                if self.until is not None and time.monotonic() >= self.until:
                    return False
        return True

    def _number(self, folder: Path) -> int:
        path = self.folder / _RUN_NUMBERS
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = folder.relative_to(self.folder).as_posix()
        if name not in known:
            known[name] = len(known)
            write_json(path, known)
        return int(known[name])


def even_points(tokens: int, count: int) -> tuple[int, ...]:
    """Return ``count`` even points of a training, the last at its end."""
    return tuple(sorted({max(1, tokens * i // count) for i in range(1, count + 1)}))


def _told(row: Row) -> str:
    found = row.reason if row.score is None else f"accuracy {100 * (row.accuracy or 0):.1f}, loss {row.valid_loss:.4f}"
    return (
        f"{row.model} | {row.task} | lr {row.lr:g}, decay {row.weight_decay:g}, seed {row.seed}: {found} "
        f"({human(row.tokens)} tokens, {row.seconds:.0f} s)"
    )


def _slug(text: str) -> str:
    """A folder name that people can read and no two texts share."""
    plain = re.sub(r"[^\w.=+-]+", "_", text).strip("_")
    return plain if plain == text else f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
