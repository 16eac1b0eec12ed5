"""``python -m hybridnas.bench``: measure side by side, say which goals are met, keep the figures."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from hybridnas.bench.context import SUITES, BenchConfig
from hybridnas.cli import show
from hybridnas.cli.command import Command, Done


@dataclass(frozen=True, kw_only=True)
class Settings(BenchConfig, Command):
    """Settings of the command: those of a run of the benchmarks."""


def run(settings: Settings) -> Done:
    """Run the suites, print each when it is done and all goals at the end, and write ``out``."""
    from hybridnas.bench import chosen
    from hybridnas.bench import run as run_suites
    from hybridnas.bench.context import provenance
    from hybridnas.bench.result import goal_rows
    from hybridnas.files import write_json

    names = chosen(settings.suite)
    facts = provenance(sys.argv[1:], settings.threads)
    show.line(f"machine: {facts['machine']['processor']}, {facts['machine']['words']}")
    if settings.tiny:
        show.line("tiny=true: the shapes are too small for figures to mean anything")
    results = run_suites(settings, _print)
    goals = goal_rows(results)
    if goals:
        columns = ["what", "against", "goal", "measured", "met", "note"]
        show.table("Goals (ratios taken pair by pair: median, quartiles)", columns, goals, left=(0, 1, 2, 4, 5))
    body = {**facts, "settings": settings.to_dict(), "suites": [result.to_dict() for result in results]}
    for result in results:
        body |= result.facts
    if settings.out:
        write_json(settings.out, body)
        show.line(f"written: {settings.out} ({', '.join(names)})")
    return Done({**body, "out": None if settings.out is None else str(settings.out)})


def _print(result: Any) -> None:
    from hybridnas.bench.result import ratio_rows, timed_rows

    show.line(f"{result.suite}: {SUITES[result.suite]} ({result.seconds:.0f} s)")
    rows = timed_rows(result)
    if rows:
        columns = ["case", "form", "median", "least", "quartiles", "rounds", "note"]
        show.table(f"{result.suite}: times of one call", columns, rows, left=(0, 1, 6))
    rows = ratio_rows(result)
    if rows:
        show.table(f"{result.suite}: ratios", ["case", "of / over", "ratio (quartiles)"], rows, left=(0, 1))
    for table in result.tables:
        shown = [[_cell(value) for value in row] for row in table.rows]
        show.table(table.title, table.columns, shown, left=(0, 1))
    for note in result.notes:
        show.line(f"  {note}")
    for file in result.files:
        show.line(f"drawn: {file}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
