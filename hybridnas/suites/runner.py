"""Runs a suite: every architecture trained on every task, the same call again going on until all is done.

Each training is a cell of an :class:`hybridnas.train.experiment.Experiment`, with a run folder of its own, so an
interrupted suite goes on where it stopped: within a run, too. The first seed tries the whole grid; the other seeds
repeat the best setting that it found.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError
from hybridnas.files import write_json
from hybridnas.suites import results
from hybridnas.suites.results import CurveRow, LengthRow, Row
from hybridnas.suites.suite import Entry, Suite, SuiteConfig, Task
from hybridnas.tracking.mlflow import open_tracker
from hybridnas.tracking.tracker import BackgroundTracker
from hybridnas.train.callbacks import Callback, StopAtAccuracy
from hybridnas.units import human

if TYPE_CHECKING:
    from torch import nn

    from hybridnas.arch.arch import Arch
    from hybridnas.cost import Cost
    from hybridnas.data.source import Source
    from hybridnas.suites.suite import Model
    from hybridnas.train.config import TrainConfig
    from hybridnas.train.experiment import Cell, CellResult
    from hybridnas.train.records import Eval, TrainResult

_RUN_NUMBERS = "numbers.json"  # folder -> number of the run in MLflow
log = logging.getLogger("hybridnas.suites")


def run_suite(
    suite: str | Suite,
    model: Model | Mapping[str, Model] | None = None,
    *,
    folder: str | Path | None = None,
    device: str = "auto",
    tracking: str | None = "off",
    callbacks: Iterable[Callback] = (),
    **settings: Any,
) -> Outcome:
    """Train a model on a published suite of tasks and return its rows; the same call again goes on.

    ``model``: a function from the vocabulary size to a module (ids (B, L) to logits (B, L, V)) or to an Arch; an Arch,
    a pattern or a preset's name; or a mapping of several of these by the names that the table gives them. None: the
    suite's own architectures. ``folder``: where runs and CSV lie; none: ``RUNS/SUITE``. ``settings``: fields of
    :class:`SuiteConfig` (``quick=True``, ``tasks=``, ``rates=``, ``seeds=``, ``tokens=``, ``minutes=`` ...).

    >>> outcome = run_suite("mqar", lambda vocab_size: MyModel(vocab_size), quick=True)
    >>> outcome.scores["model"]

    Raises ConfigError for unknown names and settings, and what training raises.
    """
    name = suite if isinstance(suite, str) else suite.name
    config = SuiteConfig.from_dict({"name": name, **settings})
    chosen = config.suite() if isinstance(suite, str) else config.applied(suite)
    place = Path(folder) if folder is not None else Path(config.runs) / config.folder_name
    if model is None:
        entries = chosen.expanded([], {})
    else:
        given = model if isinstance(model, Mapping) else {_name_of(model): model}
        entries = tuple(entry for text, one in given.items() for entry in chosen.entries_of(text, one))
    return Runner(
        chosen,
        entries,
        folder=place,
        out=Path(config.out) if config.out else place / f"{place.name}.csv",
        quick=config.quick,
        device=device,
        tracking=tracking,
        minutes=config.minutes,
        callbacks=callbacks,
    ).run()


def _name_of(model: Model) -> str:
    if isinstance(model, str):
        return model
    return str(getattr(model, "pattern", "")) or getattr(model, "__name__", "model").replace("<lambda>", "model")


@dataclass(frozen=True)
class Outcome:
    """What a call left: all rows so far, rows of lengths, and whether everything that was asked for is done."""

    rows: list[Row]
    lengths: list[LengthRow]
    curves: list[CurveRow]
    done: bool
    suite: Suite

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Score by model and column: the mean over seeds of the best setting, then over the column's tasks."""
        return results.scores(self.rows, self.suite)


@dataclass(frozen=True)
class Training:
    """What a cell of a suite is about."""

    entry: Entry
    task: Task
    config: TrainConfig
    folder: Path
    model: Arch | Callable[[], nn.Module]
    fingerprint: str
    about: dict[str, Any]  # pattern, d_model and costs, as a row has them


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
        callbacks: Iterable[Callback] = (),
        report: Callable[[str], None] | None = None,
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
        self.minutes = minutes
        self.callbacks = tuple(callbacks)
        self.report = report or (lambda text: log.info("%s", text))
        self.rows = results.read_rows(self.rows_path, suite)
        self.lengths = results.read_lengths(self.lengths_path)
        self.curves = results.read_curves(self.curves_path)
        self._until: float | None = None
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
        from hybridnas.train.experiment import Experiment

        self.folder.mkdir(parents=True, exist_ok=True)
        self._until = None if self.minutes is None else time.monotonic() + 60 * self.minutes
        about = {"suite": self.suite.name, "quick": self.quick, "score": self.suite.score}
        with open_tracker(self.tracking, self.folder, self.folder.name, about) as tracker:
            experiment = Experiment(
                self._missing(tracker), callbacks=self.callbacks, minutes=self.minutes, on_result=self._keep
            )
            experiment.run()
        chosen = {row.folder for row in results.choose(self.rows, self.suite) if row.chosen}
        lengths = [row for row in self.lengths if row.folder in chosen]
        return Outcome(self.rows, lengths, self.curves, experiment.complete and not self._late, self.suite)

    @property
    def _late(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def _groups(self) -> Iterator[tuple[Task, Entry]]:
        return ((task, entry) for task in self.suite.tasks for entry in self.entries if entry.learns(task))

    def _missing(self, tracker: BackgroundTracker) -> Iterator[Cell]:
        """Yield the trainings that have no row yet; the lengths of an architecture's task are measured after them."""
        for task, entry in self._groups():
            for training in self.trainings(entry, task):
                self._visited += 1
                if self._known(training) is None:
                    yield self._cell(training, tracker)
            if task.lengths:
                self._measure_lengths(entry, task)
            if self._late:
                return

    def trainings(self, entry: Entry, task: Task) -> Iterator[Training]:
        """Yield what to train of one architecture on one task; later seeds once the grid has been tried."""
        first, *others = entry.seeds or self.suite.seeds
        for rate in entry.rates or self.suite.rates:
            for decay in self.suite.decays:
                yield self._training(entry, task, rate, decay, first)
        if others:
            own = [row for row in self.rows if (row.model, row.task) == (entry.name, task.name)]
            best = results.best_setting(own, self.suite)
            if best is not None:
                yield from (self._training(entry, task, *best, seed) for seed in others)

    def planned(self) -> Iterator[tuple[Training, int]]:
        """Yield the first training of each architecture on each task, and how many of that kind are missing."""
        for task, entry in self._groups():
            seeds = entry.seeds or self.suite.seeds
            grid = [(rate, decay) for rate in entry.rates or self.suite.rates for decay in self.suite.decays]
            first = self._training(entry, task, *grid[0], seeds[0])
            done = sum((row.fingerprint, row.settings) == (first.fingerprint, task.digest) for row in self.rows)
            missing = len(grid) + len(seeds) - 1 - done
            if missing > 0:
                yield first, missing

    def _known(self, one: Training) -> Row | None:
        config = one.config
        key = (one.fingerprint, one.task.digest, one.task.name, config.lr, config.weight_decay, config.seed)
        return next((row for row in self.rows if row.key == key), None)

    def _training(self, entry: Entry, task: Task, rate: float, decay: float, seed: int) -> Training:
        from hybridnas.arch.arch import Arch
        from hybridnas.train.config import TrainConfig
        from hybridnas.train.loop import build_seeded, count_params, identity

        source = self.source(task)
        arch = entry.arch(source.vocab_size)
        build = partial(entry.module, source.vocab_size)
        model: Arch | nn.Module = arch or build_seeded(build, seed)
        active = model.cost().active_params if isinstance(model, Arch) else count_params(model)
        fields = {**task.train, "lr": rate, "weight_decay": decay, "seed": seed}
        if task.tokens_per_active is not None:
            fields["tokens"] = round(task.tokens_per_active * active)
        if task.flops_of is not None:
            fields["tokens"] = round(fields["tokens"] * self._flops_share(task, entry, arch, source.vocab_size))
        if task.measurements:
            fields["eval_at"] = even_points(fields["tokens"], task.measurements)
        config = TrainConfig.from_dict(fields)
        identified = identity(model, source, config)
        text = json.dumps(identified, sort_keys=True)
        name = f"lr{rate:g}-wd{decay:g}-seed{seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        folder = self.folder / _slug(entry.name) / _slug(task.name) / name
        about: dict[str, Any] = {"params": active, "active_params": active}
        if arch is not None:
            about = {"pattern": str(arch.pattern), "d_model": arch.d_model, **_costs(arch.cost(config.seq_len))}
        return Training(entry, task, config, folder, arch or build, identified["fingerprint"], about)

    def source(self, task: Task) -> Source:
        """Open a task's data, once."""
        from hybridnas.data import open_source, source_config

        if task.digest not in self._sources:
            self._require_files(task)
            self._sources[task.digest] = open_source(source_config(task.data))
        return self._sources[task.digest]

    def _require_files(self, task: Task) -> None:
        """Raise ConfigError where what a task reads does not lie on this machine; URLs are asked when they are read."""
        for path in map(str.strip, str(task.data.get("path") or "").split(",")):
            if not path or "://" in path or any(glob.iglob(path, recursive=True)):  # noqa: PTH207 - not by pathlib
                continue
            raise ConfigError(
                f"suite {self.suite.name!r} reads {path}, which is not there ({self.suite.files}); get it, or set "
                f"suite.path",
                field="suite.path",
                got=path,
                allowed=self.suite.files,
            )

    def _flops_share(self, task: Task, entry: Entry, arch: Arch | None, vocab_size: int) -> float:
        """Return the FLOPs of a token of the task's reference over those of a token of an architecture."""
        from hybridnas.arch.arch import Arch

        if arch is None:
            raise ConfigError(
                f"task {task.name!r} gives every model the FLOPs of {task.flops_of!r}, and {entry.name!r}, a module "
                f"of your own, declares none; give a pattern, a preset or an Arch",
                field="model",
                got=entry.name,
            )
        reference = Arch.from_pattern(task.flops_of or "", **{**self.suite.fields, "vocab_size": vocab_size})
        length = int(task.train["seq_len"])
        return reference.cost(length).flops_per_token / arch.cost(length).flops_per_token

    def _cell(self, one: Training, tracker: BackgroundTracker) -> Cell:
        from hybridnas.train.experiment import Cell
        from hybridnas.train.tracking import Tracking

        tracking = Tracking(
            tracker=tracker,
            number=self._number(one.folder),
            params={"model": one.entry.name, "task": one.task.name},
            tags={"preset": one.entry.preset, "fingerprint": one.fingerprint},
        )
        labels = {"model": one.entry.name, "task": one.task.name, "preset": one.entry.preset}
        stop = [] if self.suite.stop_at is None else [StopAtAccuracy(self.suite.stop_at)]
        return Cell(
            key=one.folder.relative_to(self.folder).as_posix(),
            model=one.model,
            source=self.source(one.task),
            config=one.config,
            folder=one.folder,
            device=self.device,
            keep_checkpoint=bool(one.task.lengths),
            callbacks=(tracking, *stop),
            labels={key: text for key, text in labels.items() if text is not None},
            facts={"training": one},
        )

    def _keep(self, ended: CellResult) -> None:
        """Put a training's row and curve into the CSVs."""
        one: Training = ended.cell.facts["training"]
        row = self._row(one, ended.result)
        # Read again: another process may have trained other architectures of this suite in the meantime.
        own, others = results.split_rows(self.rows_path, self.suite)
        self.rows = results.choose(results.merged(own, *self.rows, row), self.suite)
        results.write_rows(self.rows_path, [*self.rows, *others])
        self._keep_curve(row, ended.result.evals)
        self.report(f"[{self._visited}/{self.total}] {_described(row)}")

    def _row(self, one: Training, result: TrainResult) -> Row:
        last = result.evals[-1] if result.evals else None
        return Row(
            suite=self.suite.name,
            quick=self.quick,
            model=one.entry.name,
            task=one.task.name,
            column=one.task.column,
            lr=one.config.lr,
            weight_decay=one.config.weight_decay,
            seed=one.config.seed,
            status=result.status,
            score=None if last is None or result.status == "failed" else getattr(last, self.suite.score),
            accuracy=last.accuracy if last else None,
            valid_loss=last.valid_loss if last else None,
            train_loss=last.train_loss if last else None,
            tokens=last.tokens if last else 0,
            steps=last.step if last else 0,
            seconds=last.seconds if last else 0.0,
            tokens_per_second=result.tokens_per_second,
            fingerprint=one.fingerprint,
            **one.about,
            seq_len=one.config.seq_len,
            settings=one.task.digest,
            reason=result.reason if result.status == "failed" else "",
            folder=one.folder.relative_to(self.folder).as_posix(),
        )

    def _keep_curve(self, row: Row, evals: Sequence[Eval]) -> None:
        about = {name: getattr(row, name) for name in ("model", "task", "lr", "weight_decay", "seed", "folder")}
        kept = [point for point in results.read_curves(self.curves_path) if point.folder != row.folder]
        for value in evals:
            figures = {name: getattr(value, name) for name in ("tokens", "valid_loss", "train_loss", "accuracy")}
            kept.append(CurveRow(**about, **figures))
        self.curves = kept
        results.write_rows(self.curves_path, kept)

    def _measure_lengths(self, entry: Entry, task: Task) -> None:
        """Measure the chosen trainings at the task's lengths, until time is up."""
        from hybridnas.suites.lengths import at_lengths
        from hybridnas.train.checkpoint import load_model

        for row in results.choose(self.rows, self.suite):
            if (row.model, row.task) != (entry.name, task.name) or not row.chosen:
                continue
            known = {(old.folder, old.length) for old in self.lengths}
            wanted = [length for length in task.lengths if (row.folder, length) not in known]
            if not wanted:
                continue
            if entry.model is not None and not row.pattern:
                raise ConfigError(
                    f"task {task.name!r} measures a model at {wanted}, chunk by chunk through its state, which "
                    f"{entry.name!r} does not have; choose other tasks with tasks=[...]",
                    field="tasks",
                    got=task.name,
                )
            model = load_model(self.folder / row.folder)
            measured = at_lengths(model, task.data, wanted, device=self.device, name=entry.name, seed=row.seed)
            for found in measured:
                named = {"task": task.name, "folder": row.folder}
                self.lengths = [*results.read_lengths(self.lengths_path), LengthRow(**{**asdict(found), **named})]
                results.write_rows(self.lengths_path, self.lengths)
                self.report(f"{entry.name}, seed {row.seed}, length {found.length:,}: {results.length_words(found)}")
                if self._late:
                    return

    def _number(self, folder: Path) -> int:
        path = self.folder / _RUN_NUMBERS
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = folder.relative_to(self.folder).as_posix()
        if name not in known:
            known[name] = len(known)
            write_json(path, known)
        return int(known[name])


def _costs(cost: Cost) -> dict[str, int]:
    names = ("params", "active_params", "embedding_params", "state_bytes")
    return {name: getattr(cost, name) for name in names}


def even_points(tokens: int, count: int) -> tuple[int, ...]:
    """Return ``count`` even points of a training, the last at its end."""
    return tuple(sorted({max(1, tokens * i // count) for i in range(1, count + 1)}))


def _described(row: Row) -> str:
    found = row.reason if row.score is None else f"accuracy {100 * (row.accuracy or 0):.1f}, loss {row.valid_loss:.4f}"
    return (
        f"{row.model} | {row.task} | lr {row.lr:g}, decay {row.weight_decay:g}, seed {row.seed}: {found} "
        f"({human(row.tokens)} tokens, {row.seconds:.0f} s)"
    )


def _slug(text: str) -> str:
    """A folder name that people can read and no two texts share."""
    plain = re.sub(r"[^\w.=+-]+", "_", text).strip("_")
    return plain if plain == text else f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
