"""The same search with several seeds: who wins, what is claimed, and how long it takes.

A search is believed where its seeds never make two different claims: each of two architectures said to beat the other,
or two winners of which each is said to beat all that it was compared with. Each search is a study of its own, so the
same call goes on; its row is written when it ends. Not part of ``suite=all``: a laptop search takes minutes.
"""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hybridnas.analysis.ranking import trained_drawn
from hybridnas.analysis.verdict import verdict
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites.table import say
from hybridnas.files import write_csv
from hybridnas.report.claims import confirmed_headline, study_documents
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.named import named_budget, named_data, named_space
from hybridnas.search.runner import Search, SearchSummary
from hybridnas.study.records import COMPLETE, TrialRecord

SEEDS = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search and its verdict."""

    seed: int
    winner: str  # preset's name or pattern
    pattern: str
    fingerprint: str
    beaten: str  # what the winner is claimed to beat, names joined by blanks
    compared: int  # how many the winner was compared with
    ahead: str  # what is claimed to beat the winner
    words: str  # the verdict as the report has it
    drawn: int  # candidates besides presets that trained
    best_drawn: str  # best of them by the search's own seed
    seconds: float  # of the call that ended it
    ended: str

    @property
    def confident(self) -> bool:
        """Whether the winner is claimed to beat everything that it was compared with."""
        return bool(self.compared) and len(self.beaten.split()) == self.compared


def run(config: BenchConfig) -> Result:
    """Search with as many seeds as asked for and tabulate the verdicts."""
    if not config.tiny:
        return _run(config, Path("runs/verdicts"))
    with tempfile.TemporaryDirectory() as folder:
        return _run(config, Path(folder))


def _run(config: BenchConfig, runs: Path) -> Result:
    result = Result("verdicts")
    space = config.space or "mamba_moe"
    count = 1 if config.tiny else config.repeats or SEEDS
    path = runs / f"{space}-{config.budget}.csv" if config.out is None else config.out.with_suffix(".csv")
    rows = {row.seed: row for row in _read(path)}
    for seed in range(count):
        if seed in rows:
            continue
        found = _search(space, config, seed, runs)
        say(f"seed {seed}: {found.words} ({found.seconds:.0f} s)")
        if found.ended == "interrupted":
            break
        rows[seed] = found
        _write(path, [rows[one] for one in sorted(rows)])
    result.tables += tables([rows[seed] for seed in sorted(rows)])
    result.files.append(str(path))
    return result


def _search(space: str, config: BenchConfig, seed: int, runs: Path) -> Row:
    budget = Budget.from_dict({**named_budget("smoke" if config.tiny else config.budget), "confirm": "on"})
    if config.tiny:
        budget = budget.replace(n_trials=2, minutes=0.2, confirm_top=1, confirm_seeds=2, tokens_per_active_param=0.5)
    settings = SearchConfig(
        space=named_space(space),
        data=named_data("stdlib"),
        budget=budget,
        study=f"{space}-{budget.name}-seed{seed}",
        runs=runs,
        seed=seed,
        tracking="off",
        confirm_workers=1 if config.tiny else None,
    )
    return row_of(Search(settings).run(), seed, budget.alpha)


def row_of(summary: SearchSummary, seed: int, alpha: float) -> Row:
    """Return what a finished search said."""
    records, best = summary.records, summary.best
    found = verdict(records, summary.reference, documents=study_documents(summary.folder), alpha=alpha)
    claimed = [] if found is None else [one for one in found.others if one.claimed(alpha)]
    drawn = trained_drawn(records)
    whole = [one for one in drawn if one.state == COMPLETE and one.valid_loss is not None]
    chosen: TrialRecord | None = found.best if found is not None else best
    return Row(
        seed=seed,
        winner="" if chosen is None else chosen.name,
        pattern="" if chosen is None else chosen.pattern,
        fingerprint="" if chosen is None else chosen.fingerprint,
        beaten=" ".join(one.name for one in claimed if one.gap.mean < 0),
        compared=0 if found is None else len(found.others),
        ahead=" ".join(one.name for one in claimed if one.gap.mean > 0),
        words="no verdict" if found is None else confirmed_headline(found, summary.reference),
        drawn=len(drawn),
        best_drawn=min(whole, key=lambda one: (one.valid_loss, one.number)).pattern if whole else "",
        seconds=round(summary.seconds, 1),
        ended=summary.ended,
    )


def contradictions(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the pairs of searches whose claims cannot both be right."""
    return [
        (one, other)
        for at, one in enumerate(rows)
        for other in rows[at + 1 :]
        if one.winner != other.winner
        and (
            (one.confident and other.confident)
            or (other.winner in one.beaten.split() and one.winner in other.beaten.split())
        )
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the searches, and how often each architecture won."""
    won = Counter(row.winner for row in rows)
    sure = Counter(row.winner for row in rows if row.confident)
    lines = [[name, count, sure[name]] for name, count in won.most_common()]
    against = len(contradictions(rows))
    return [
        Table(
            "verdicts: one search a seed",
            ("seed", "winner", "claimed to beat", "drawn", "seconds", "verdict"),
            [[r.seed, r.winner, r.beaten or "-", r.drawn, round(r.seconds), r.words] for r in rows],
        ),
        Table(f"verdicts: winners ({against} pairs of searches contradict each other)", _WON, lines),
    ]


_WON = ("winner", "searches", "of them claimed to beat all compared")


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [_row(cells) for cells in csv.DictReader(file)]


def _row(cells: Mapping[str, str]) -> Row:
    kinds = {"int": int, "float": float, "str": str}
    return Row(**{item.name: kinds[str(item.type)](cells[item.name]) for item in fields(Row)})


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_csv(path, [item.name for item in fields(Row)], map(asdict, rows))
