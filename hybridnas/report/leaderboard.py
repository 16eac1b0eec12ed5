"""The leaderboard of a study as files and tables: exact numbers in CSV and TSV, three figures in a terminal.

Its order is that of :func:`hybridnas.analysis.ranking.rows`; losses are compared with the study's reference preset.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.confirmation import confirmed_winner, summaries
from hybridnas.analysis.held_out import TEST
from hybridnas.analysis.ranking import Row, rows
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, WORDS, TrialRecord, save
from hybridnas.units import human, human_bytes, percent, several

if TYPE_CHECKING:
    from rich.console import Console

SPEEDS = ("ms_per_token", "train_tokens_per_second", "prefill_tokens_per_second", "decode_tokens_per_second")
TESTED = "Ordered by validation loss; test losses and differences are of the test part, which chose nothing."
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
    "test_loss",
    "reference",
    "vs_reference",
    "vs_reference_part",
    "confirmed_mean",
    "confirmed_error",
    "confirmed_seeds",
    "confirmed_test_mean",
    "confirmed_test_error",
    "bits_per_byte",
    "accuracy",
    "test_bits_per_byte",
    "test_accuracy",
    "test_repeat_loss",
    "test_repeat_accuracy",
    "ms_per_token",
    "train_tokens_per_second",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
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


def write_leaderboard(study_folder: Path | str, records: Iterable[TrialRecord], reference: str | None) -> Path:
    """Write ``leaderboard.csv`` with exact numbers, atomically; cheap enough for after every trial.

    ``reference``: the preset that losses are compared with. Raises StudyError when the disk refuses.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(exact(row, reference) for row in rows(records, reference))
    path = Path(study_folder) / "leaderboard.csv"
    save(path, text.getvalue())
    return path


def exact(row: Row, reference: str | None) -> list[str]:
    """Return a row's values in the order of ``CSV_COLUMNS``, unrounded; unknown values are empty."""
    record, cost = row.record, row.record.cost
    confirmed = next(iter(summaries([record])), None)
    tested = next(iter(summaries([record], TEST)), None)
    values: dict[str, Any] = {
        **{column: getattr(record, column, None) for column in CSV_COLUMNS},
        **{name: cost.get(name) for name in ("params", "active_params", "embedding_params")},
        "state_bytes": record.figures.get("state_bytes", cost.get("state_bytes")),  # at the study's state_length
        "flops_per_token": cost.get("flops_per_token"),
        "rank": row.rank,
        "front": 1 if row.front else None,
        "trial": record.number,
        **{name: record.figures.get(name) for name in SPEEDS},
        "prefill_tokens_per_second": record.figures.get(SPEEDS[2], record.figures.get("tokens_per_second")),
        "confirmed_mean": confirmed.value if confirmed else None,
        "confirmed_error": confirmed.error if confirmed else None,
        "confirmed_seeds": confirmed.n if confirmed else None,
        "confirmed_test_mean": tested.value if tested else None,
        "confirmed_test_error": tested.error if tested else None,
        "valid_loss": row.loss,
        "reference": reference,
        "vs_reference": row.gap,
        "vs_reference_part": None if row.gap is None else row.part,
        "tokens_per_active_param": row.tokens_per_active,
    }
    return ["" if values[column] is None else " ".join(str(values[column]).split()) for column in CSV_COLUMNS]


def render_leaderboard(
    records: Iterable[TrialRecord], reference: str | None, console: Console | None = None, limit: int = 25
) -> None:
    """Print the leaderboard: a table of ``limit`` trials in a terminal, all of them as exact TSV lines in a pipe."""
    from rich.console import Console

    console = console or Console()
    lines = rows(records, reference)
    if not console.is_terminal:
        for cells in (CSV_COLUMNS, *(exact(row, reference) for row in lines)):
            console.file.write("\t".join(cells) + "\n")
        return
    _print_table(lines, console, limit, reference)


def _print_table(lines: Sequence[Row], console: Console, limit: int, reference: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [row for row in lines if row.record.state in (COMPLETE, PRUNED, FAIL)]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    choices = differing_choices(row.record for row in shown)
    cells = [human_cells(row, reference, choices) for row in shown[:limit]]
    columns = _columns(console.width, cells, reference, any(row.part == TEST for row in lines))
    for name in columns:
        left = name in ("architecture", "state")
        table.add_column(Text(name), justify="left" if left else "right", overflow="fold")
    for row, own in zip(shown, cells, strict=False):
        style = "bold" if row.rank == 1 else "cyan" if row.is_preset else "dim" if row.rank is None else ""
        table.add_row(*(Text(own[name]) for name in columns), style=style)
    console.print(table)
    for sentence in footnotes(lines, len(shown) - limit):
        console.print(Text(sentence, style="dim"))


# Columns that a narrow terminal does without, the first of them first.
_SPARE = ("FLOPs", "tok/s", "acc", "memory", "recall", "params", "active", "trial", "state")


def _columns(width: int, cells: Sequence[dict[str, str]], reference: str | None, tested: bool) -> list[str]:
    """Choose the columns that a terminal of this width can show without breaking a word."""
    choices = list(cells[0])[list(cells[0]).index("state") + 1 :] if cells else []
    names = ["#", "trial", "architecture", *choices, "params", "active", "memory", "FLOPs", "loss"]
    names += ["test"] if tested else []
    names += [f"vs {reference}"] if reference is not None else []
    names += ["acc", *(["recall"] if any(own["recall"] for own in cells) else []), "tok/s", "state"]
    for spare in (*_SPARE[:5], *choices, *_SPARE[5:]):
        if _room(names, cells) > width and spare in names:
            names.remove(spare)
    return names


def _room(names: Sequence[str], cells: Sequence[dict[str, str]]) -> int:
    """Return the width that columns need for their longest words."""
    widths = [
        max(len(word) for text in (name, *(own[name] for own in cells)) for word in [*text.split(), ""])
        for name in names
    ]
    return sum(widths) + 3 * len(names)


def human_cells(row: Row, reference: str | None, choices: Sequence[str] = ()) -> dict[str, str]:
    """Return a row as people read it, by column name; ``choices`` of the space last."""
    record, cost = row.record, row.record.cost
    reason = f": {record.reason}" if record.state == FAIL and record.reason else ""
    return {
        "#": str(row.rank or ""),
        "trial": str(record.number),
        "architecture": row.architecture,
        "params": human(cost.get("params")),
        "active": human(cost.get("active_params")),
        "memory": human_bytes(record.figures.get("state_bytes", cost.get("state_bytes"))),
        "FLOPs": human(cost.get("flops_per_token")),
        "loss": "" if row.loss is None else f"{row.loss:.4f}" + ("" if row.rank else "*"),
        "test": "" if record.test_loss is None else f"{record.test_loss:.4f}",
        f"vs {reference}": signed(row.gap),
        "acc": percent(record.accuracy),
        "recall": percent(record.test_repeat_accuracy),
        "tok/s": human(record.tokens_per_second),
        "state": WORDS[record.state] + reason,
        **{name: choice_text(record, name) for name in choices},
    }


def differing_choices(records: Iterable[TrialRecord], limit: int = 4) -> list[str]:
    """Return the choices of the space in which trials differ and that their patterns do not show, at most ``limit``."""
    values: dict[str, set[str]] = {}
    for record in records:
        if record.preset is None:
            for name, value in record.choices.items():
                values.setdefault(name, set()).add(str(value))
    return [
        name
        for name, known in values.items()
        if len(known) > 1 and name not in ("candidate", "motif_length") and not name.startswith("slot")
    ][:limit]


def choice_text(record: TrialRecord, name: str) -> str:
    """Return what the space chose for a trial; empty for a preset."""
    value = record.choices.get(name)
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def footnotes(lines: Sequence[Row], hidden: int = 0) -> list[str]:
    """Return what a reader must know beside the table, in sentences."""
    notes = []
    if hidden > 0:
        notes.append(f"{hidden} more in leaderboard.csv.")
    if any(row.part == TEST for row in lines):
        notes.append(TESTED)
    if any(row.record.state == PRUNED and row.loss is not None for row in lines):
        notes.append("* at the last rung before the trial was stopped: not comparable with a full trial.")
    for state, meaning in (
        (DUPLICATE, "repeated an architecture and reused its result"),
        (INFEASIBLE, "refused before any training"),
    ):
        count = sum(row.record.state == state for row in lines)
        if count:
            notes.append(f"{count} candidate{'s' if count > 1 else ''} {meaning}.")
    best = next((row for row in lines if row.rank == 1), None)
    sure = confirmed_winner(row.record for row in lines)
    if sure is not None:
        notes.append(
            f"Those with fresh seeds come first, by their mean over {several(len(sure.confirmed), 'seed')}; losses and "
            f"differences are those of the search's own seed."
        )
    if best and best.tokens_per_active is not None:
        certain = "one seed, unconfirmed" if sure is None else f"confirmed by {several(len(sure.confirmed), 'seed')}"
        notes.append(
            f"The best saw {human(best.record.tokens)} tokens, {best.tokens_per_active:.1f} per active parameter; "
            f"{certain}."
        )
    return notes


def signed(value: float | None) -> str:
    """Write a difference of losses with its sign, in ten-thousandths of a nat; nothing for None."""
    if value is None:
        return ""
    return "0" if abs(value) < 5e-5 else f"{value:+.4f}"
