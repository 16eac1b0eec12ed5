"""Builds the table of a space: every architecture trained, the best quarter with further seeds, in pieces that resume.

Not part of ``suite=all``: it takes as long as the trainings take. Ended at any moment, the same command goes on;
``part=0/2`` and ``part=1/2`` are two processes that write one table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hybridnas.analysis.rung_correlation import agreements
from hybridnas.arch.arch import Arch
from hybridnas.bench.context import BenchConfig, provenance
from hybridnas.bench.result import Result
from hybridnas.bench.result import Table as Sheet
from hybridnas.data import Source, open_source, source_config
from hybridnas.errors import ConfigError, MatchError
from hybridnas.search.sampling.distinct import Fixed
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.space import Scale, Space, load_space
from hybridnas.tabular.table import Row, Table, TableSpec
from hybridnas.train.loop import run as train_run
from hybridnas.train.records import Eval

_WORK = Path("runs") / "table"  # where unfinished trainings lie


class Wanted(NamedTuple):
    """An architecture of the space and the choices that lead to it."""

    arch: Arch
    choices: dict[str, Any]


def architectures(space: Space, scale: Scale) -> list[Wanted]:
    """Return every distinct architecture that the space can draw, in an order that is random and always the same.

    So any beginning of the table is a fair sample of the space.
    """
    found: dict[str, Wanted] = {}
    for choices in every_choice(space, scale):
        with contextlib.suppress(MatchError):
            proposal = space.propose(Fixed(choices), scale)
            found.setdefault(proposal.arch.fingerprint(), Wanted(proposal.arch, choices))
    wanted = list(found.values())
    random.Random(0).shuffle(wanted)
    return wanted


def run(config: BenchConfig) -> Result:
    """Build or go on with the table of ``space=``; returns what it holds."""
    result = Result("table")
    if config.tiny:
        table = tiny_table()
    else:
        table = build(load_space(config.space), part=_part(config.part), minutes=config.minutes, news=_say)
    result.tables.append(summary(table))
    result.tables.append(fidelity(table))
    result.files.append(str(table.path))
    return result


def build(
    space: Space,
    *,
    part: tuple[int, int] = (0, 1),
    minutes: float | None = None,
    news: Callable[[str], None] = lambda text: None,
    work: Path = _WORK,
) -> Table:
    """Train what the table lacks of this part, each result written at once; returns the table as it then is.

    ``minutes``: no training starts that would probably end later. Raises StudyError for a table of other settings.
    """
    return _Builder(space, part, minutes, news, work).run()


class _Builder:
    """One process at a table."""

    def __init__(
        self, space: Space, part: tuple[int, int], minutes: float | None, news: Callable[[str], None], work: Path
    ) -> None:
        self.space, self.part, self.news = space, part, news
        self.spec = TableSpec.of(space)
        self.path = self.spec.file()
        self.work = work
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.source: Source = open_source(source_config(self.spec.data))
        self.scale = self.spec.budget.scale(self.source.vocab_size)
        self.target = space.target(self.scale)
        self.wanted = architectures(space, self.scale)
        facts = provenance(sys.argv[1:])
        self.facts = {"command": facts["command"], "commit": (facts["commit"] or "unknown")[:12]}
        self.longest = 0.0

    def run(self) -> Table:
        table = self._read()
        self.news(
            f"{len(self.wanted)} architectures of {self.target:,} active parameters, each trained on "
            f"{self._tokens():,} tokens of {self.source.describe()}; {len(table.rows)} runs are in {self.path}"
        )
        first = self.spec.budget.rung_tokens(self.target)  # raises early where the rungs cannot be met
        assert first
        for number, wanted in enumerate(self.wanted):
            if number % self.part[1] == self.part[0] and not self._one(wanted, 0):
                return self._read()
        table = self._read()
        if len(table.by_fingerprint) < len(self.wanted):
            missing = len(self.wanted) - len(table.by_fingerprint)
            self.news(f"{missing} architectures of other parts are not there yet; further seeds follow when they are")
            return table
        ranked = sorted(table.firsts(), key=lambda row: row.score)
        best = {row.fingerprint for row in ranked[: -(-len(ranked) // 4)]}
        for number, wanted in enumerate(self.wanted):
            if wanted.arch.fingerprint() in best and number % self.part[1] == self.part[0]:
                for seed in range(1, self.spec.seeds):
                    if not self._one(wanted, seed):
                        return self._read()
        return self._read()

    def _tokens(self) -> int:
        return self.spec.budget.rung_tokens(self.target)[-1]

    def _read(self) -> Table:
        return Table.read(self.path) if self.path.exists() else Table([], self.path)

    def _one(self, wanted: Wanted, seed: int) -> bool:
        """Train one run unless the table has it; returns False where the time is up."""
        fingerprint = wanted.arch.fingerprint()
        if any(row.seed == seed for row in self._read().by_fingerprint.get(fingerprint, [])):
            return True
        if self.until is not None and time.monotonic() + self.longest > self.until:
            self.news("the minutes are used; the same command goes on")
            return False
        began = time.monotonic()
        row = self._train(wanted, seed)
        self.longest = max(self.longest, time.monotonic() - began)
        table = self._add(row)
        ended = f"failed: {row.failed}" if row.failed else f"loss {row.score:.4f}"
        self.news(f"{len(table.rows):4} runs  {row.pattern:8} seed {seed}  {row.cpu_seconds:.1f} core-seconds  {ended}")
        return True

    def _train(self, wanted: Wanted, seed: int) -> Row:
        arch = wanted.arch
        folder = self.work / f"{self.space.name}-{arch.short}-{seed}"
        settings = self.spec.budget.train_config(self.target, seed).replace(eval_at=self.spec.points(self.target))
        began = time.process_time()
        done = train_run(arch, self.source, settings, folder=folder, device="cpu", keep_checkpoint=False)
        row = Row(
            pattern=str(arch.pattern),
            fingerprint=arch.fingerprint(),
            vocab_size=arch.vocab_size,
            choices=wanted.choices,
            seed=seed,
            cost=dataclasses.asdict(arch.cost(self.spec.budget.seq_len)),
            tokens=done.evals[-1].tokens if done.evals else 0,
            losses={value.tokens: value.valid_loss for value in done.evals},
            accuracies={value.tokens: value.accuracy for value in done.evals},
            parts=_parts(done.evals),
            tokens_per_second=round(done.tokens_per_second),
            seconds=round(done.evals[-1].seconds, 2) if done.evals else 0.0,
            cpu_seconds=round(time.process_time() - began, 2),
            settings=self.spec.settings(self.space),
            data=self.source.fingerprint[:12],
            failed=done.reason if done.status != "completed" else "",
            **self.facts,
        )
        shutil.rmtree(folder, ignore_errors=True)
        return row

    def _add(self, row: Row) -> Table:
        """Put a row into the file, which other parts write, too."""
        with _hold(self.work / f"{self.space.name}.lock"):
            old = self._read()
            table = Table([*old.rows, row], self.path)
            table.write()
        return table


def _parts(evals: list[Eval]) -> dict[str, float]:
    last = evals[-1].aux if evals else {}
    return {name: value for name, value in last.items() if name.startswith(("loss.", "accuracy."))}


@contextlib.contextmanager
def _hold(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:  # Windows: one part at a time
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def summary(table: Table) -> Sheet:
    """Return what the table holds: how many, how well, how much seeds matter beside architectures."""
    import statistics

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


def _say(text: str) -> None:
    print(text, flush=True)


def _part(text: str) -> tuple[int, int]:
    """Read '0/2'; raises ConfigError."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"bench part={text!r} must be INDEX/COUNT with INDEX below COUNT, e.g. part=0/2")
    return int(index), int(count)


def tiny_table() -> Table:
    """Build a table of four architectures in a temporary folder and return it."""
    with tempfile.TemporaryDirectory() as folder:
        budget = {
            **{"d_model": 8, "depth": 2, "n_experts": 2, "multiple": 1, "seq_len": 16, "batch_size": 2},
            **{"tokens_per_active_param": 0.1, "rungs": 2, "reduction": 2, "valid_tokens": 64},
        }
        spec = {"path": f"{folder}/t.csv", "data": {"kind": "stdlib", "max_bytes": 100_000}, "budget": budget}
        space = {"name": "tiny", "letters": ["M", "F"], "motif_length": [2], "baselines": [], "table": spec}
        return build(Space.from_mapping(space), work=Path(folder))
