"""Build the table of a space whose every architecture is trained, and state what it holds.

Not part of ``suite=all``: it takes as long as the trainings take. ``part=0/2`` and ``part=1/2`` are two processes.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

from hybridnas.analysis.rung_correlation import agreements
from hybridnas.bench.context import BenchConfig, provenance
from hybridnas.bench.result import Result
from hybridnas.bench.result import Table as Sheet
from hybridnas.errors import ConfigError
from hybridnas.search.table import Table
from hybridnas.search_spaces.space import load_space
from hybridnas.tabular.build import build, tiny_table


def run(config: BenchConfig) -> Result:
    """Build or go on with the table of ``space=``; returns what it holds."""
    result = Result("table")
    if config.tiny:
        table = tiny_table()
    else:
        table = build(
            load_space(config.space or "tabular"),
            part=_part(config.part),
            minutes=config.minutes,
            report=say,
            origin=origin(),
        )
    result.tables.append(summary(table))
    result.tables.append(fidelity(table))
    result.files.append(str(table.path))
    return result


def summary(table: Table) -> Sheet:
    """Return what the table holds: how many, how well, how much seeds matter beside architectures."""
    firsts = [row.score for row in table.firsts() if not row.failed]
    pairs = [[row.score for row in rows] for rows in table.by_fingerprint.values() if len(rows) > 1]
    seeds = statistics.mean(statistics.variance(pair) for pair in pairs) ** 0.5 if pairs else None
    rows: list[list[Any]] = [
        ["architectures", len(table.by_fingerprint)],
        ["runs", len(table.rows)],
        ["failed runs", sum(bool(row.failed) for row in table.rows)],
        ["core-minutes", sum(row.cpu_seconds for row in table.rows) / 60],
        ["best loss [nats]", min(firsts, default=None)],
        ["median loss [nats]", statistics.median(firsts) if firsts else None],
        ["standard deviation between architectures [nats]", statistics.stdev(firsts) if len(firsts) > 1 else None],
        [f"standard deviation between seeds [nats], of {len(pairs)} architectures", seeds],
    ]
    return Sheet(f"table: {table.path}", ("what", "figure"), rows)


def fidelity(table: Table, points: tuple[int, ...] | None = None) -> Sheet:
    """Return the rank correlation of the scores at each point with the full ones, over all architectures."""
    rows = [
        [one.tokens, one.tokens / one.full, one.spearman, one.kendall, one.n]
        for one in agreements((row.losses for row in table.firsts() if not row.failed), points)
    ]
    title = "table: rank correlation with the full score"
    return Sheet(title, ("tokens", "of the full run", "Spearman", "Kendall", "architectures"), rows)


def origin() -> dict[str, str]:
    """Return the command and commit that a row of the table names."""
    facts = provenance(sys.argv[1:])
    return {"command": facts["command"], "commit": (facts["commit"] or "unknown")[:12]}


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def _part(text: str) -> tuple[int, int]:
    """Read '0/2'; raises ConfigError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"bench part={text!r} must be INDEX/COUNT with INDEX below COUNT, e.g. part=0/2")
    return int(index), int(count)
