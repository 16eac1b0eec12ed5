"""The leaderboard of a study: trials by loss, with their distance to the paper's ``moe_mamba`` and to ``mamba``.

Completed trials are ranked; pruned ones follow with the loss of their last rung, which is not comparable and marked;
then what failed or was rejected, with its reason. Exact numbers in CSV and TSV, three figures for people.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.search.confirm import confirmed_winner, summaries
from hybridnas.study.objectives import eligible, front, score
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    RUNNING,
    TrialRecord,
    save,
)
from hybridnas.units import human, human_bytes

if TYPE_CHECKING:
    from rich.console import Console

BASELINES = ("moe_mamba", "mamba")  # the paper's model and the one that it was measured against
_ORDER = {COMPLETE: 0, PRUNED: 1, FAIL: 2, INFEASIBLE: 3, DUPLICATE: 4, RUNNING: 5}
CSV_COLUMNS = (
    "rank",
    "front",
    "trial",
    "preset",
    "pattern",
    "params",
    "active_params",
    "embedding_params",
    "state_bytes",
    "flops_per_token",
    "valid_loss",
    "vs_moe_mamba",
    "vs_mamba",
    "confirmed_mean",
    "confirmed_error",
    "confirmed_seeds",
    "bits_per_byte",
    "accuracy",
    "ms_per_token",
    "tokens_read_per_second",
    "tokens",
    "tokens_per_active_param",
    "tokens_per_second",
    "seconds",
    "state",
    "seed",
    "duplicate_of",
    "reason",
    "fingerprint",
)


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard. ``vs`` holds the loss minus the baseline's: negative is better."""

    record: TrialRecord
    rank: int | None  # completed trials only, from 1
    loss: float | None  # of a pruned trial: at its last rung
    vs: dict[str, float | None]
    tokens_per_active: float | None
    front: bool = False  # no other completed trial beats it in all objectives

    @property
    def is_baseline(self) -> bool:
        """Whether the trial is a preset."""
        return self.record.preset is not None

    @property
    def architecture(self) -> str:
        """Return the preset's name and pattern, or the pattern."""
        preset = self.record.preset
        return f"{preset} {self.record.pattern}" if preset else self.record.pattern


def rows(records: Iterable[TrialRecord]) -> list[Row]:
    """Return the leaderboard's rows: completed by loss, pruned by tokens then loss, then failed, then the others."""
    kept = list(records)
    marks = {name: baseline_loss(kept, name) for name in BASELINES}
    best = {record.number for record in front(kept)}
    ranked = 0
    found = []
    for record in sorted(kept, key=_key):
        loss = last_loss(record)
        rank = None
        if record.state == COMPLETE and loss is not None:
            ranked += 1
            rank = ranked
        vs = {
            name: loss - mark if rank and loss is not None and mark is not None else None
            for name, mark in marks.items()
        }
        active = record.cost.get("active_params")
        ratio = record.tokens / active if active and record.tokens else None
        found.append(Row(record, rank, loss, vs, ratio, record.number in best))
    return found


def winner(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the completed trial that is best in the first objective, the earlier of two equals; None before the first.

    Once the best were trained again with fresh seeds, their mean over these decides, and only they can win. A baseline
    that passes one of the limits cannot.
    """
    kept = list(records)
    sure = confirmed_winner(kept)
    if sure is not None:
        return sure
    return min(filter(eligible, kept), key=lambda record: (score(record), record.number), default=None)


def baseline(records: Iterable[TrialRecord], preset: str) -> TrialRecord | None:
    """Return the completed trial of a preset, through the original where the preset's trial repeats another."""
    by_number = {record.number: record for record in records}
    for record in by_number.values():
        if record.preset == preset:
            if record.state == DUPLICATE and record.duplicate_of is not None:
                record = by_number.get(record.duplicate_of, record)
            if record.state == COMPLETE:
                return record
    return None


def baseline_loss(records: Iterable[TrialRecord], preset: str) -> float | None:
    """Return the final loss of a preset's trial, None where it did not complete."""
    record = baseline(records, preset)
    return record.valid_loss if record else None


def last_loss(record: TrialRecord) -> float | None:
    """Return the final loss, or for a stopped trial the last one that it recorded."""
    if record.valid_loss is not None:
        return record.valid_loss
    points = record.points()
    return points[-1][1] if points else None


def write_leaderboard(study_folder: Path | str, records: Iterable[TrialRecord]) -> Path:
    """Write ``leaderboard.csv`` with exact numbers, atomically; cheap enough for after every trial."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(exact(row) for row in rows(records))
    path = Path(study_folder) / "leaderboard.csv"
    save(path, text.getvalue())
    return path


def exact(row: Row) -> list[str]:
    """Return a row's values in the order of ``CSV_COLUMNS``, unrounded; unknown values are empty."""
    record, cost = row.record, row.record.cost
    sure = next(iter(summaries([record])), None)
    values: dict[str, Any] = {
        **{column: getattr(record, column, None) for column in CSV_COLUMNS},
        **{name: cost.get(name) for name in ("params", "active_params", "embedding_params", "state_bytes")},
        "flops_per_token": cost.get("flops_per_token"),
        "rank": row.rank,
        "front": 1 if row.front else None,
        "trial": record.number,
        "ms_per_token": record.figures.get("ms_per_token"),
        "tokens_read_per_second": record.figures.get("tokens_per_second"),
        "confirmed_mean": sure.value if sure else None,
        "confirmed_error": sure.error if sure else None,
        "confirmed_seeds": sure.n if sure else None,
        "valid_loss": row.loss,
        "vs_moe_mamba": row.vs["moe_mamba"],
        "vs_mamba": row.vs["mamba"],
        "tokens_per_active_param": row.tokens_per_active,
    }
    return ["" if values[column] is None else " ".join(str(values[column]).split()) for column in CSV_COLUMNS]


def render_leaderboard(records: Iterable[TrialRecord], console: Console | None = None, limit: int = 25) -> None:
    """Print the leaderboard: a table of ``limit`` trials in a terminal, all of them as exact TSV lines in a pipe."""
    from rich.console import Console

    console = console or Console()
    lines = rows(records)
    if not console.is_terminal:
        for cells in (CSV_COLUMNS, *(exact(row) for row in lines)):
            console.file.write("\t".join(cells) + "\n")
        return
    _print_table(lines, console, limit)


def _print_table(lines: Sequence[Row], console: Console, limit: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [row for row in lines if row.record.state in (COMPLETE, PRUNED, FAIL)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = _columns(console.width)
    for name, left in columns:
        table.add_column(name, justify="left" if left else "right", overflow="fold" if left else "ellipsis")
    for row in shown[:limit]:
        cells = human_cells(row)
        style = "bold" if row.rank == 1 else "cyan" if row.is_baseline else "dim" if row.rank is None else ""
        table.add_row(*(Text(cells[name]) for name, _ in columns), style=style)
    console.print(table)
    for sentence in footnotes(lines, len(shown) - limit):
        console.print(Text(sentence, style="dim"))


def _columns(width: int) -> list[tuple[str, bool]]:
    """Choose the columns that a terminal of this width can show, the most telling first."""
    names = ["#", "trial", "architecture", "params", "active", "loss", "vs moe_mamba", "vs mamba", "state"]
    if width >= 110:
        names[5:5] = ["memory"]
    if width >= 130:
        names[6:6] = ["FLOPs"]
        names[-1:-1] = ["acc", "tok/s"]
    return [(name, name in ("architecture", "state")) for name in names]


def human_cells(row: Row) -> dict[str, str]:
    """Return a row as people read it, by column name."""
    record, cost = row.record, row.record.cost
    reason = f": {record.reason}" if record.state == FAIL and record.reason else ""
    return {
        "#": str(row.rank or ""),
        "trial": str(record.number),
        "architecture": row.architecture,
        "params": human(cost.get("params")),
        "active": human(cost.get("active_params")),
        "memory": human_bytes(cost.get("state_bytes")),
        "FLOPs": human(cost.get("flops_per_token")),
        "loss": "" if row.loss is None else f"{row.loss:.4f}" + ("" if row.rank else "*"),
        "vs moe_mamba": signed(row.vs["moe_mamba"]),
        "vs mamba": signed(row.vs["mamba"]),
        "acc": "" if record.accuracy is None else f"{100 * record.accuracy:.1f}%",
        "tok/s": human(record.tokens_per_second),
        "state": record.state.lower() + reason,
    }


def footnotes(lines: Sequence[Row], hidden: int = 0) -> list[str]:
    """Return what a reader must know beside the table, in sentences."""
    notes = []
    if hidden > 0:
        notes.append(f"{hidden} more in leaderboard.csv.")
    if any(row.record.state == PRUNED and row.loss is not None for row in lines):
        notes.append("* at the last rung before the trial was stopped: not comparable with a full trial.")
    for state, words in ((DUPLICATE, "repeated an architecture and reused its result"), (INFEASIBLE, "were rejected")):
        count = sum(row.record.state == state for row in lines)
        if count:
            notes.append(f"{count} candidate{'s' if count > 1 else ''} {words if count > 1 else _singular(words)}.")
    best = next((row for row in lines if row.rank == 1), None)
    if best and best.tokens_per_active is not None:
        notes.append(
            f"The best saw {human(best.record.tokens)} tokens, {best.tokens_per_active:.1f} per active parameter; "
            "one seed, unconfirmed."
        )
    return notes


def signed(value: float | None) -> str:
    """Write a difference of losses with its sign, in ten-thousandths of a nat; nothing for None."""
    if value is None:
        return ""
    return "0" if abs(value) < 5e-5 else f"{value:+.4f}"


def _key(record: TrialRecord) -> tuple[int, float, float, int]:
    value = score(record) if record.objectives else last_loss(record)
    known = float("inf") if value is None else value
    order = _ORDER[record.state] if record.state != COMPLETE or value is not None else _ORDER[FAIL]
    return (order, -record.tokens if record.state == PRUNED else 0, known, record.number)


def _singular(words: str) -> str:
    return words.replace("were", "was")
