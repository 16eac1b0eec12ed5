"""python -m hybridnas.compare: runs and studies from MLflow side by side."""

from __future__ import annotations

from typing import Any

from hybridnas.cli import show
from hybridnas.report.compare import CompareConfig, compare, write_comparison

HELP = "put runs and studies from MLflow side by side: table, curves, tokens to reach a loss"


def run(config: dict[str, Any]) -> int:
    """Print the table and write ``compare.html`` and ``compare.csv``."""
    named = {key: str(config[key]) for key in ("study", "run", "baseline") if isinstance(config.get(key), int)}
    settings = CompareConfig.from_dict({**config, **named})  # run=7 is a name, too
    comparison = compare(settings)
    page, sheet = write_comparison(comparison, settings.out)
    columns, rows = comparison.table()
    show.table(f"tokens to {comparison.baseline}'s final loss", columns, rows, left=(0, 1, len(columns) - 1))
    if show.is_terminal():
        show.line(f"written: {page} and {sheet}")
    return 0
