"""A suite's results: one row per run in a CSV that grows, and what the table and the figures make of it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_type_hints

from hybridnas.analysis.rung_correlation import rank_correlation
from hybridnas.errors import StudyError
from hybridnas.files import write_csv
from hybridnas.suites.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training: what, how, and what came of it."""

    suite: str
    quick: bool
    model: str  # as the table names it
    task: str
    column: str
    lr: float
    weight_decay: float
    seed: int
    status: str  # completed | stopped (accurate enough) | failed
    score: float | None  # the suite's score at the end; none: failed before any measurement
    chosen: bool = False  # belongs to the model's best setting of the grid for this task
    accuracy: float | None = None  # [0 to 1]
    valid_loss: float | None = None  # [nats per scored token]
    train_loss: float | None = None
    tokens: int = 0  # trained
    steps: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    pattern: str = ""
    fingerprint: str = ""
    d_model: int = 0
    params: int = 0
    active_params: int = 0
    embedding_params: int = 0
    state_bytes: int = 0  # of one sequence of the task's length
    seq_len: int = 0
    settings: str = ""  # digest of data and schedule: rows of other settings are not mixed in
    reason: str = ""
    folder: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same run."""
        return (self.fingerprint, self.settings, self.task, self.lr, self.weight_decay, self.seed)


@dataclass(frozen=True, kw_only=True)
class LengthRow:
    """Accuracy of a trained model at one length."""

    model: str
    task: str
    seed: int
    length: int
    accuracy: float | None  # none: not run, words say why
    examples: int = 0
    state_bytes: int = 0  # of one sequence at that length, by the cost model
    peak_bytes: int = 0  # resident memory of the process at most so far
    seconds: float = 0.0
    words: str = ""
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """One measurement of a run."""

    model: str
    task: str
    lr: float
    weight_decay: float
    seed: int
    tokens: int  # trained
    valid_loss: float
    train_loss: float
    accuracy: float
    folder: str


def read_rows(path: Path, suite: Suite) -> list[Row]:
    """Return the rows of a suite's CSV that belong to its present tasks; none where there is no file."""
    return split_rows(path, suite)[0]


def split_rows(path: Path, suite: Suite) -> tuple[list[Row], list[Row]]:
    """Return the rows of a suite's present tasks, and those of other data or schedules: kept, not compared."""
    wanted = {(task.name, task.digest) for task in suite.tasks}
    own: list[Row] = []
    others: list[Row] = []
    for row in _read(path, Row):
        (own if (row.task, row.settings) in wanted else others).append(row)
    return own, others


def read_lengths(path: Path) -> list[LengthRow]:
    """Return the rows of a CSV of lengths; none where there is no file."""
    return _read(path, LengthRow)


def read_curves(path: Path) -> list[CurveRow]:
    """Return the measurements of a suite's runs; none where there is no file."""
    return _read(path, CurveRow)


def beside(out: Path, what: str) -> Path:
    """Return where the rows of lengths or curves lie: beside those of the runs."""
    return out.with_name(f"{out.stem}-{what}{out.suffix}")


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Replace a CSV whole."""
    if not rows:
        return
    lines = ({k: int(v) if isinstance(v, bool) else v for k, v in asdict(row).items()} for row in rows)
    write_csv(path, [item.name for item in fields(rows[0])], lines)


def merged(old: Iterable[Row], *new: Row) -> list[Row]:
    """Return old and new rows, each replaced by a later row of the same key."""
    return list({row.key: row for row in (*old, *new)}.values())


def choose(rows: Sequence[Row], suite: Suite) -> list[Row]:
    """Mark, for each model and task, the rows of the best setting that the first seed found in the grid."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for group, own in grouped(rows, lambda row: (row.model, row.task)).items():
        setting = best_setting(own, suite)
        if setting is not None:
            best[group] = setting
    return [replace(row, chosen=best.get((row.model, row.task)) == (row.lr, row.weight_decay)) for row in rows]


def best_setting(rows: Sequence[Row], suite: Suite) -> tuple[float, float] | None:
    """Return the (rate, decay) whose run of the first seed scored best; of equals by tokens, then by loss."""
    first = [row for row in rows if row.score is not None and row.seed == suite.seeds[0] and row.status != "failed"]
    if not first:
        return None
    sign = -1 if suite.higher else 1
    top = min(first, key=lambda row: (sign * _of(row.score), row.tokens, row.valid_loss or 0.0))
    return (top.lr, top.weight_decay)


def scores(rows: Sequence[Row], suite: Suite) -> dict[str, dict[str, float]]:
    """Return model -> column -> score: the mean over seeds of the chosen runs, then over the column's tasks.

    A column whose tasks have not all been run is left out: means of different tasks would not compare.
    """
    found: dict[str, dict[str, float]] = {}
    chosen = [row for row in choose(rows, suite) if row.chosen and row.score is not None]
    for (model, column), own in grouped(chosen, lambda row: (row.model, row.column)).items():
        by_task = grouped(own, lambda row: row.task)
        if len(by_task) == sum(task.column == column for task in suite.tasks):
            means = [fmean(_of(row.score) for row in task_rows) for task_rows in by_task.values()]
            found.setdefault(model, {})[column] = fmean(means)
    return found


def table(rows: Sequence[Row], suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of text: ours best first, then the published ones with their sources."""
    ours, columns = scores(rows, suite), suite.columns
    said_elsewhere = [c for row in suite.published for c in row.values if c != "average" and c not in columns]
    others = list(dict.fromkeys(said_elsewhere))
    average = ["average"] if len(columns) > 1 else []
    by_model = grouped(rows, lambda row: row.model)
    lines = []
    order = sorted(ours, key=lambda name: fmean(ours[name].values()), reverse=suite.higher)
    order.sort(key=lambda name: -len(ours[name]))
    for model in [*order, *(name for name in by_model if name not in ours)]:
        own = ours.get(model, {})
        mean = [_shown(fmean(own.values()), suite) if len(own) == len(columns) else "-"] if average else []
        cells = [*(_shown(own.get(c), suite) for c in columns), *mean, *("-" for _ in others)]
        lines.append([model, *cells, _words(by_model[model], suite)])
    for row in suite.published:
        cells = [_printed(row.values.get(c), suite) for c in columns]
        more = [f"{row.values[c]:g}" if c in row.values else "-" for c in others]
        mean = [_printed(row.values.get("average"), suite)] if average else []
        lines.append([f"{row.model} [published]", *cells, *mean, *more, f"{row.source}; {row.settings}"])
    return ["model", *columns, *average, *others, "settings"], lines


def length_table(rows: Sequence[LengthRow], suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of text: accuracy [%] at each length, a line per training, then the published."""
    lengths = sorted({row.length for row in rows})
    names = [power_of_two(length) for length in lengths]
    lines = []
    for model, task, seed in dict.fromkeys((row.model, row.task, row.seed) for row in rows):
        own = {row.length: row for row in rows if (row.model, row.task, row.seed) == (model, task, seed)}
        cells = [length_words(own[length]) if length in own else "-" for length in lengths]
        lines.append([model, *cells, f"ours: {task}, seed {seed}"])
    for row in suite.published:
        figures = [f"{row.values[name]:g}" if name in row.values else "-" for name in names]
        lines.append([f"{row.model} [published]", *figures, f"{row.source}; {row.settings}"])
    return ["model", *names, "settings"], lines


def length_words(row: LengthRow) -> str:
    """Return accuracy in per cent, or why there is none."""
    return row.words if row.accuracy is None else f"{100 * row.accuracy:.1f}"


def power_of_two(length: int) -> str:
    """Return 2^k where the length is one, else its digits."""
    return f"2^{length.bit_length() - 1}" if length & (length - 1) == 0 else f"{length:,}"


def agreement(one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """Return [column, models in both, rank correlation] of two score tables, and of their averages."""
    columns = dict.fromkeys(column for model in one.values() for column in model)
    lines: list[list[Any]] = []
    for column in columns:
        shared = [name for name in one if column in one[name] and column in other.get(name, {})]
        pairs = [one[name][column] for name in shared], [other[name][column] for name in shared]
        lines.append([column, len(shared), rank_correlation(*pairs)[0]])
    whole = [n for n in one if n in other and set(one[n]) == set(columns) == set(other[n])]
    means = [fmean(one[name].values()) for name in whole], [fmean(other[name].values()) for name in whole]
    return [*lines, ["average", len(whole), rank_correlation(*means)[0]]] if len(columns) > 1 else lines


def in_unit(score: float, suite: Suite) -> float:
    """Return a loss [nats per token] in the suite's unit, or an accuracy as it is."""
    return score / math.log(2) if suite.unit else score


def unit(suite: Suite) -> str:
    """Return the unit of a suite's losses."""
    return f"bits/{suite.unit}" if suite.unit else "nats/token"


def grouped(rows: Iterable[Row], by: Any) -> dict[Any, list[Row]]:
    """Return key -> rows, in the order in which keys appear."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return found


def _shown(value: float | None, suite: Suite) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if suite.higher else f"{in_unit(value, suite):.4f}"


def _printed(value: float | None, suite: Suite) -> str:
    """A published figure of the suite's own columns: accuracies are in per cent already."""
    return "-" if value is None else f"{value:.1f}" if suite.higher else f"{value:g}"


def _words(rows: Sequence[Row], suite: Suite) -> str:
    chosen = [row for row in choose(rows, suite) if row.chosen]
    rates = sorted({row.lr for row in chosen})
    seeds = len({row.seed for row in chosen})
    failed = sum(row.status == "failed" for row in rows)
    source = f"ours: lr {'/'.join(f'{rate:g}' for rate in rates) or '-'}, {seeds} seed{'s' * (seeds != 1)}"
    return source + (f", {failed} of {len(rows)} runs failed" if failed else "")


def _of(value: float | None) -> float:
    assert value is not None
    return value


def _read(path: Path, kind: Any) -> list[Any]:
    if not path.is_file():
        return []
    hints = get_type_hints(kind)
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line, values in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(kind(**{name: _value(values[name], hints[name]) for name in hints}))
            except (KeyError, ValueError, TypeError):
                raise StudyError(
                    f"{path} line {line} is not a row of {kind.__name__}; move the file away to start a new one"
                ) from None
    return rows


def _value(text: str, hint: Any) -> Any:
    if hint is bool:
        return bool(int(text))
    if hint in (int, float, str):
        return hint(text)
    return None if text == "" else float(text)
