"""A space whose every architecture has been trained: scores are looked up in a table instead of trained.

The space's YAML has a ``table`` with the file and with what it was trained on::

    table:
      path: experiments/results/tabular.csv
      data: {kind: stdlib}
      budget: {d_model: 32, depth: 4, ...}

A row is one training run; ``python -m hybridnas.bench table`` writes them, ``space=tabular`` reads them.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.arch.arch import Arch
from hybridnas.config import FrozenConfig, option
from hybridnas.cost import Cost
from hybridnas.data.source import Batch, Source
from hybridnas.errors import ConfigError, MatchError, StudyError
from hybridnas.files import write_csv, write_json
from hybridnas.search.config import ADDED, Budget, SearchConfig
from hybridnas.search.rates import Tried
from hybridnas.search_spaces.space import Space
from hybridnas.study.records import ARCH, TrialRecord, trial_folder
from hybridnas.train.callbacks import Action
from hybridnas.train.records import Eval, TrainResult

if TYPE_CHECKING:
    from hybridnas.search.history import History
    from hybridnas.search.latency import Figure
    from hybridnas.search.plan import Plan

COSTS = tuple(item.name for item in dataclasses.fields(Cost))
_HEAD = ("pattern", "fingerprint", "vocab_size", "choices", "seed", *COSTS, "tokens")
_TAIL = ("parts", "tokens_per_second", "seconds", "cpu_seconds", "failed", "settings", "data", "command", "commit")
_LOSS, _ACCURACY = "loss_at_", "accuracy_at_"  # and the count of training tokens
_PACKAGE = Path(__file__).resolve().parents[1]  # has a link to experiments/ in a checkout, and a copy in a wheel


@dataclass(frozen=True, kw_only=True)
class TableSpec(FrozenConfig):
    """Where a space's table lies and how its rows were trained."""

    path: str = option(doc="the table, a CSV file [path]")
    data: Mapping[str, Any] = field(metadata={"doc": "the data's settings as a mapping"})
    budget: Budget = field(metadata={"doc": "size, length and rungs of every row"})
    seeds: int = option(2, "runs of each architecture in the best quarter, each of its own seed [count]", ge=1)
    further_rungs: tuple[tuple[int, int], ...] = field(
        default=(), metadata={"doc": "further (rungs, growth) whose token counts are measured, too"}
    )

    @classmethod
    def label(cls) -> str:
        return "space.table"

    @classmethod
    def of(cls, space: Space) -> TableSpec:
        """Read a space's ``table``; raises ConfigError for a space that has none, or a key that is wrong."""
        if not space.table:
            raise ConfigError(f"space {space.name!r} has no table; choose one that has, e.g. space=tabular")
        given = dict(space.table)
        for key in ("data", "budget"):
            if not isinstance(given.get(key), Mapping):
                raise ConfigError(f"space {space.name!r} table needs {key}, a mapping of settings")
        given["budget"] = Budget.from_dict({"name": space.name, **given["budget"]}, where=f"space {space.name!r} table")
        given["further_rungs"] = tuple((int(rungs), int(growth)) for rungs, growth in given.get("further_rungs", ()))
        return cls.from_dict(given, where=f"space {space.name!r} table")

    def points(self, active_params: int) -> tuple[int, ...]:
        """Return the training-token counts at which every row is measured: the budget's rungs and the further ones."""
        counts = set(self.budget.rung_tokens(active_params))
        for rungs, growth in self.further_rungs:
            counts |= set(self.budget.replace(rungs=rungs, growth=growth).rung_tokens(active_params))
        return tuple(sorted(counts))

    def settings(self, space: Space) -> str:
        """Return 12 hex digits of all that decides a row's numbers: rows that differ in them cannot be compared."""
        limits = ("name", "n_trials", "minutes", "rungs", "reduction", "growth", "evals")
        added = {key for key, value in ADDED.items() if getattr(self.budget, key) == value}
        budget = {key: value for key, value in self.budget.to_dict().items() if key not in (*limits, *added)}
        data = {key: value for key, value in self.data.items() if key != "cache_dir"}
        text = json.dumps({"data": data, "budget": budget, "match": space.match}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def file(self) -> Path:
        """Return the table's path: as given from the current folder, or else the package's own."""
        path = Path(self.path).expanduser()
        return path if path.exists() or path.is_absolute() or not (_PACKAGE / path).exists() else _PACKAGE / path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training run of one architecture; losses are validation cross-entropy [nats per token]."""

    pattern: str
    fingerprint: str
    vocab_size: int  # of the data, part of the fingerprint
    choices: Mapping[str, Any]
    seed: int
    cost: Mapping[str, float]
    tokens: int  # trained
    losses: Mapping[int, float]  # training tokens -> loss
    accuracies: Mapping[int, float]  # training tokens -> share of right predictions [0 to 1]
    parts: Mapping[str, float]  # of data in parts: the last loss and accuracy of each, as loss.NAME and accuracy.NAME
    tokens_per_second: float
    seconds: float  # wall time
    cpu_seconds: float  # of all threads
    settings: str
    data: str  # first 12 hex digits of the data's fingerprint
    failed: str = ""  # why there is no full score
    command: str = ""
    commit: str = ""

    @property
    def score(self) -> float:
        """The loss at the last point; infinite for a run that failed."""
        return math.inf if self.failed or not self.losses else self.losses[max(self.losses)]

    def cells(self, points: Iterable[int]) -> dict[str, Any]:
        """Return column -> cell."""
        return {
            **{name: getattr(self, name) for name in (*_HEAD, *_TAIL) if hasattr(self, name)},
            **{name: json.dumps(dict(getattr(self, name)), sort_keys=True) for name in ("choices", "parts")},
            **self.cost,
            **{f"{_LOSS}{point}": self.losses.get(point, "") for point in points},
            **{f"{_ACCURACY}{point}": self.accuracies.get(point, "") for point in points},
        }

    @classmethod
    def of(cls, cells: Mapping[str, str]) -> Row:
        """Read a CSV line; raises KeyError or ValueError for what is not one of ours."""
        return cls(
            **{name: cells[name] for name in ("pattern", "fingerprint", "settings", "data", "failed", "command")},
            commit=cells["commit"],
            choices=json.loads(cells["choices"]),
            parts=json.loads(cells["parts"]),
            vocab_size=int(cells["vocab_size"]),
            seed=int(cells["seed"]),
            cost={name: float(cells[name]) for name in COSTS},
            tokens=int(cells["tokens"]),
            losses=_at(cells, _LOSS),
            accuracies=_at(cells, _ACCURACY),
            tokens_per_second=float(cells["tokens_per_second"]),
            seconds=float(cells["seconds"]),
            cpu_seconds=float(cells["cpu_seconds"]),
        )


def _at(cells: Mapping[str, str], kind: str) -> dict[int, float]:
    return {int(key[len(kind) :]): float(value) for key, value in cells.items() if key.startswith(kind) and value}


class Table:
    """The rows of a table by architecture; the first seed is what a search sees."""

    def __init__(self, rows: Iterable[Row], path: Path) -> None:
        self.path = path
        self.rows = sorted(rows, key=lambda row: (row.pattern, row.fingerprint, row.seed))
        self.by_fingerprint: dict[str, list[Row]] = {}
        for row in self.rows:
            self.by_fingerprint.setdefault(row.fingerprint, []).append(row)

    @property
    def points(self) -> tuple[int, ...]:
        """Every token count at which some row was measured."""
        return tuple(sorted({point for row in self.rows for point in row.losses}))

    def firsts(self) -> Iterator[Row]:
        """Yield the run of lowest seed of every architecture."""
        yield from (rows[0] for rows in self.by_fingerprint.values())

    def write(self) -> None:
        """Write the CSV, whole or not at all."""
        points = self.points
        columns = [*_HEAD, *(f"{kind}{point}" for kind in (_LOSS, _ACCURACY) for point in points), *_TAIL]
        write_csv(self.path, columns, (row.cells(points) for row in self.rows))

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a CSV; raises StudyError in one sentence for one that is missing or not a table."""
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [Row.of(cells) for cells in csv.DictReader(file)]
        except FileNotFoundError:
            raise StudyError(
                f"the table {path} is missing; build it with python -m hybridnas.bench table "
                f"(an hour or more on one core), or give its place with space.table.path=FILE"
            ) from None
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise StudyError(f"the table {path} cannot be read: {type(error).__name__} {error}") from None
        return cls(rows, path)


def load_table(space: Space) -> tuple[TableSpec, Table]:
    """Return a space's table, ready for a search; raises StudyError where it is missing, empty or of other settings."""
    spec = TableSpec.of(space)
    table = Table.read(spec.file())
    if not table.rows:
        raise StudyError(f"the table {table.path} is empty; go on with python -m hybridnas.bench table")
    others = sorted({row.settings for row in table.rows} - {spec.settings(space)})
    if others:
        raise StudyError(
            f"the table {table.path} was trained with other settings than space {space.name!r} states "
            f"({', '.join(others)} there, {spec.settings(space)} here); undo the change of space.table"
        )
    if len({row.data for row in table.rows}) > 1:
        raise StudyError(f"the table {table.path} mixes runs on different data; build it again from one corpus")
    return spec, table


class TableSource(Source):
    """Stands where data would: a search on a table reads none, and looks up what training would give."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @property
    def vocab_size(self) -> int:
        return self.table.rows[0].vocab_size

    @property
    def fingerprint(self) -> str:
        """Identity of the scores: those of the table's rows."""
        known = [(row.fingerprint, row.seed, sorted(row.losses.items())) for row in self.table.rows]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def describe(self) -> str:
        return f"scores of {len(self.table.by_fingerprint)} architectures, looked up in {self.table.path}"

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        raise ConfigError("a search on a table trains nothing; train its winner with python -m hybridnas.train")

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        raise ConfigError("a search on a table has no data; choose data=NAME and a space without a table")

    def require(self, arch: Arch) -> None:
        """Raise MatchError for an architecture that the table does not have."""
        if arch.fingerprint() not in self.table.by_fingerprint:
            raise MatchError(
                f"pattern '{arch.pattern}' at these sizes is not among the {len(self.table.by_fingerprint)} "
                f"architectures of {self.table.path}; python -m hybridnas.bench table goes on building it"
            )


class LookupTrainer:
    """What trainers that look scores up have in common: no checkpoints, and so nothing to keep, count or remove."""

    def measured(self, number: int) -> Sequence[int]:
        return ()

    def kept(self, number: int) -> bool:
        return True

    def tidy(self, plan: Plan, history: History) -> None:
        pass

    def progress(self, number: int) -> str:
        return ""

    def try_rate(self, record: TrialRecord, arch: Arch, lr: float, tokens: int) -> Tried:
        raise ConfigError(
            "a search on a table trains nothing, so candidates have no learning rates to choose from; set rate=shared "
            "in its budget",
            field="budget.rate",
            got="tuned",
            allowed="shared",
        )


class TableTrainer(LookupTrainer):
    """Gives a search the scores of a table in place of training; of a trial, its architecture is kept in its folder."""

    def __init__(self, source: TableSource, rungs: Sequence[int], study: Path) -> None:
        missing = [point for point in rungs if point not in source.table.points]
        if missing:
            raise StudyError(
                f"the table {source.table.path} has no scores at {missing[0]:,} tokens but at "
                f"{', '.join(f'{point:,}' for point in source.table.points)}: choose space.table.budget.rungs and "
                f".growth so that rungs meet these",
                field="space.table.budget.rungs",
                got=missing[0],
                allowed=source.table.points,
            )
        self.source, self.rungs, self.study = source, tuple(rungs), study

    def figures(self, arch: Arch) -> Mapping[str, Figure]:
        raise ConfigError(
            "a search on a table measures no speed; leave speeds and times out of its objectives and limits",
            field="objectives",
        )

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        """Return what training ``arch`` gave at the rungs; raises MatchError for one that the table does not have."""
        self.source.require(arch)
        folder = trial_folder(self.study, record.number)
        if not (folder / ARCH).exists():
            write_json(folder / ARCH, arch.to_dict())
        row = self.source.table.by_fingerprint[arch.fingerprint()][0]
        speed = row.tokens_per_second
        longest = max(row.losses, default=1)
        evals = [
            Eval(
                *(point, 0, math.nan, row.losses[point], None, row.accuracies.get(point, math.nan), speed),
                row.seconds * point / longest,
            )
            for point in self.rungs
            if point in row.losses
        ]
        return looked_up(evals, self.rungs, on_eval, failed=row.failed, folder=folder)


def looked_up(
    evals: Sequence[Eval], rungs: Sequence[int], on_eval: Callable[[Eval], Action], *, failed: str, folder: Path
) -> TrainResult:
    """Return known evaluations as a training that gives them one by one, and that ``on_eval`` may pause or stop.

    ``failed``: why the last of them is missing; empty where it is not.
    """
    seen: list[Eval] = []
    for value in evals:
        seen.append(value)
        action = on_eval(value)
        if action != Action.CONTINUE and value.tokens != rungs[-1]:
            return TrainResult(
                "paused" if action == Action.PAUSE else "stopped", "", seen, None, folder, value.tokens_per_second
            )
    speed = seen[-1].tokens_per_second if seen else 0.0
    return TrainResult("failed" if failed else "completed", failed, seen, None, folder, speed)


def on_table(config: SearchConfig, space: Space) -> tuple[SearchConfig, TableSource]:
    """Return the search with the table's own size and data, whatever else was asked for, and its scores.

    The limits of the call (trials, minutes, tokens) stay; nothing is trained, so nothing is confirmed. Raises as
    :func:`load_table`.
    """
    spec, table = load_table(space)
    limits = {name: getattr(config.budget, name) for name in ("n_trials", "minutes", "max_tokens")}
    budget = spec.budget.replace(**limits, confirm="off")
    return config.replace(budget=budget, data=dict(spec.data)), TableSource(table)
