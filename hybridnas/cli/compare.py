"""python -m hybridnas.compare: runs and studies side by side."""

from __future__ import annotations

from dataclasses import dataclass

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.report.compare import CompareConfig, compare, draw_curves, write_comparison
from hybridnas.units import several


@dataclass(frozen=True, kw_only=True)
class Settings(CompareConfig, Command):
    """Settings of the command: those of a comparison."""


def run(settings: Settings) -> Done:
    """Print the table and write ``compare.html`` and ``compare.csv``."""
    comparison = compare(settings)
    page, sheet = write_comparison(comparison, settings.out)
    for group in comparison.groups:
        columns, rows = comparison.table(group)
        title = f"{group.title}: tokens to {group.baseline}'s final loss" if group.baseline else group.title
        show.table(title, columns, rows, left=(0, 1, len(columns) - 1), spare=(4, 3, 7, 2, 10, 8))
        for pool in group.pools():
            half = "" if pool.half is None else f" ± {pool.half:.4f}"
            show.line(f"{pool.name}: loss {pool.mean:.4f}{half} over {several(pool.seeds, 'seed')}")
    figures = [] if settings.figure is None else draw_curves(comparison, settings.figure)
    show.line(f"written: {', '.join(map(str, [page, sheet, *figures]))}")
    found = []
    for run in comparison.runs:
        reach = comparison.reaches[run.run_id]
        found.append(
            {
                **{name: getattr(run, name) for name in ("name", "study", "trial", "pattern", "fingerprint", "status")},
                "tokens": run.points[-1][0] if run.points else None,
                "loss": run.points[-1][1] if run.points else None,
                "tokens_to_baseline": reach.tokens if reach else None,
                "speed_up": reach.speed_up if reach else None,
            }
        )
    return Done({"baseline": comparison.baseline, "runs": found, "page": str(page), "table": str(sheet)})
