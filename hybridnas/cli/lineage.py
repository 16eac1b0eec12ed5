"""A model's grafts as tables: what ``graft`` prints at its end, and ``describe model=`` of a model that has some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybridnas.cli import show

COLUMNS = ["layer", "block", "from", "start", "error of the fit", "same function"]


def layer_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows of the new blocks of one graft."""
    return [
        [
            str(row["layer"]),
            row["block"],
            "inserted" if row["from_layer"] is None else f"layer {row['from_layer']} ({row['from']})",
            row["start"],
            " -> ".join(f"{value:.3f}" for value in row["error"]) if row.get("error") else "-",
            "yes" if row.get("exact") else "no",
        ]
        for row in record.get("layers", [])
    ]


def show_lineage(lineage: Sequence[Mapping[str, Any]]) -> None:
    """Print each graft that led to a model, the oldest first, and the tokens of all of them."""
    from hybridnas.export.card import graft_losses

    for number, record in enumerate(lineage, 1):
        parent = record.get("parent", {})
        title = f"Graft {number}: {'; '.join(record.get('edits', []))}, of {parent.get('pattern')}"
        if rows := layer_rows(record):
            show.table(title, COLUMNS, rows, left=(1, 2, 3))
        else:
            show.line(f"{title}: all blocks keep their weights")
        if found := graft_losses(record):
            show.line(f"validation loss [nats per token]: {found}")
    spent = sum(record.get("tokens", 0) + record.get("fit_tokens", 0) for record in lineage)
    show.line(f"grafts: {len(lineage)}, with {spent:,} tokens of fits and trainings beside the first model's own")
