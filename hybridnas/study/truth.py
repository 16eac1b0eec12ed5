"""The truth set on disk: architectures trained at several sizes, rates and seeds, one row of a CSV per training.

``architectures.csv`` lists what is trained and for what: the choosing half decides defaults, the reporting half only
states how good they are. Loss is cross-entropy [nats per token].
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.files import write_csv

CHOOSING, REPORTING = "choosing", "reporting"
HALVES = (CHOOSING, REPORTING)
TEXT, RECALL = "text", "recall"
RATES = (0.012, 0.004, 0.036)  # that every architecture is trained at, in this order
RUNGS = (0.125, 0.25, 0.5, 1.0)  # shares of a training's tokens at which every row has a score
_POINTS = {"losses": "loss_at_", "accuracies": "accuracy_at_", "trunk": "trunk_at_"}  # field -> column without rung


@dataclass(frozen=True, kw_only=True)
class Listed:
    """An architecture of the truth set."""

    pattern: str
    half: str  # choosing | reporting
    preset: str = ""  # of a baseline


@dataclass(frozen=True, kw_only=True)
class TruthRow:
    """One training. The order of the fields is that of the columns; rungs are shares of ``tokens``."""

    pattern: str
    fingerprint: str
    half: str  # choosing | reporting
    size: int  # active parameters that the architecture was matched to [count per token]
    d_model: int
    active_params: int
    params: int
    embedding_params: int
    flops_per_token: float  # forward, at the training's length
    state_bytes: int
    task: str  # text | recall
    schedule: str
    rate: float
    seed: int
    tokens: int  # of the whole training, branches not counted
    losses: Mapping[float, float]  # rung -> validation loss; of schedule wsd after its decay
    accuracies: Mapping[float, float]  # rung -> share of right predictions [0 to 1]
    trunk: Mapping[float, float]  # rung -> validation loss where the decay begins, at the full rate; of wsd alone
    curve: tuple[tuple[int, float, float], ...]  # (tokens, validation loss, mean training loss since the one before)
    test_loss: float | None  # at the end, on the part that nothing is chosen by
    test_repeat_loss: float | None = None  # there, over the places that say again what their window has said before
    test_repeat_accuracy: float | None = None  # [0 to 1]
    trained_tokens: int  # all that were computed, decay branches included
    tokens_per_second: float
    cpu_seconds: float  # of all threads
    failed: str = ""  # why there is no full score
    settings: str = ""  # digest of all that decides the numbers beside architecture, rate and seed
    data: str = ""  # first 12 hex digits of the data's fingerprint
    command: str = ""
    commit: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows one training."""
        return (self.fingerprint, self.size, self.task, self.schedule, self.rate, self.seed, self.settings)

    @property
    def loss(self) -> float:
        """The validation loss at the end; infinite where it was not reached."""
        return float("inf") if self.failed else self.losses.get(1.0, float("inf"))


def read_listed(path: Path) -> list[Listed]:
    """Return the architectures of the truth set in the order in which they are trained; raises StudyError."""
    return [Listed(**cells) for cells in _lines(path)]


def write_listed(path: Path, listed: Iterable[Listed]) -> None:
    """Write the list, whole or not at all."""
    names = [item.name for item in fields(Listed)]
    write_csv(path, names, [{name: getattr(one, name) for name in names} for one in listed])


def read_truth(path: Path) -> list[TruthRow]:
    """Return the rows of a truth set; none where there is no file yet. Raises StudyError for another CSV."""
    if not path.exists():
        return []
    try:
        return [_row(cells) for cells in _lines(path)]
    except (KeyError, ValueError, TypeError) as error:
        raise StudyError(
            f"the truth set {path} cannot be read: {type(error).__name__} {error}; python -m hybridnas.bench truth "
            f"writes a new one once this is moved away"
        ) from None


def write_truth(path: Path, rows: Iterable[TruthRow]) -> None:
    """Write the rows in a fixed order, whole or not at all."""
    ordered = sorted(rows, key=lambda row: (row.size, row.task, row.schedule, row.pattern, row.rate, row.seed))
    columns = []
    for item in fields(TruthRow):
        columns += [f"{_POINTS[item.name]}{rung:g}" for rung in RUNGS] if item.name in _POINTS else [item.name]
    write_csv(path, columns, [_cells(row) for row in ordered])


def _cells(row: TruthRow) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for item in fields(TruthRow):
        value = getattr(row, item.name)
        if item.name in _POINTS:
            cells |= {f"{_POINTS[item.name]}{rung:g}": value.get(rung, "") for rung in RUNGS}
        elif item.name == "curve":
            cells["curve"] = json.dumps(value, separators=(",", ":"))
        else:
            cells[item.name] = "" if value is None else value
    return cells


def _row(cells: Mapping[str, str]) -> TruthRow:
    read: dict[str, Any] = {}
    for item in fields(TruthRow):
        if item.name in _POINTS:
            known = {rung: cells[f"{_POINTS[item.name]}{rung:g}"] for rung in RUNGS}
            read[item.name] = {rung: float(text) for rung, text in known.items() if text}
        elif item.name == "curve":
            read["curve"] = tuple(
                (int(t), float(valid), float(train)) for t, valid, train in json.loads(cells["curve"])
            )
        elif item.name.startswith("test_"):  # the first rows of the set were measured without repeats
            read[item.name] = float(cells[item.name]) if cells.get(item.name) else None
        else:
            read[item.name] = {"int": int, "float": float, "str": str}[str(item.type)](cells[item.name])
    return TruthRow(**read)


def _lines(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise StudyError(f"{path} cannot be read: {error.strerror or error}", field="path", got=str(path)) from None
