"""Train the truth set, by which the accuracy of budgets is measured, and state what it holds.

Not part of ``suite=all``: it takes many hours. The same command in several terminals shares the work.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hybridnas.analysis.decisions import Rows, step_share
from hybridnas.arch.pattern import parse
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites.decisions import share_words
from hybridnas.bench.suites.table import origin, say
from hybridnas.errors import ConfigError
from hybridnas.study.truth import CHOOSING, REPORTING, Listed, TruthRow, read_listed
from hybridnas.tabular.truth import SIZES, TruthSize, TruthSpec, build_truth

ARCHITECTURES = Path(__file__).resolve().parents[2] / "experiments/results/truth-architectures.csv"


def run(config: BenchConfig) -> Result:
    """Train what the truth set lacks at the sizes that are asked for; returns what it then holds."""
    result = Result("truth")
    if config.tiny:
        rows = tiny_truth()
    else:
        spec = TruthSpec(architectures=read_listed(ARCHITECTURES), sizes=_sizes(config.sizes))
        if config.patterns:
            spec = _of_patterns(config, spec.sizes)
        rows = build_truth(spec, config.truth, Path("runs/truth"), minutes=config.minutes, report=say, origin=origin())
        result.files.append(str(config.truth))
    result.tables.append(summary(rows))
    if config.patterns:
        result.tables += shares(Rows(rows))
    return result


def _of_patterns(config: BenchConfig, sizes: Sequence[TruthSize]) -> TruthSpec:
    """Return a set of the given architectures, rates and seeds alone; raises ConfigError for the truth set's file."""
    if config.truth == BenchConfig().truth:
        raise ConfigError(
            f"bench truth with patterns would add to the truth set {config.truth}; give it a file with truth=FILE.csv",
            field="truth",
            got=str(config.truth),
        )
    plain = [TruthSize(active_params=s.active_params, d_model=s.d_model, batch_size=s.batch_size,
                       valid_tokens=s.valid_tokens) for s in sizes]  # fmt: skip
    listed = [Listed(pattern=str(parse(pattern)), half=REPORTING) for pattern in config.patterns]
    return TruthSpec(architectures=listed, sizes=plain)


def shares(rows: Rows, baseline: str = "Mx4") -> list[Table]:
    """Return which share of the baseline's steps each other architecture needs to its final loss, at every size."""
    lines = []
    for size in rows.sizes:
        for pattern in rows.patterns:
            found = step_share(rows, size, pattern, baseline) if pattern != baseline else None
            if found is not None:
                lines.append([size, pattern, found.seeds, found.gap, share_words(found.share, found.interval)])
    columns = (
        "size",
        "pattern",
        "seeds",
        f"loss of {baseline} minus its own [nats]",
        f"share of the steps of {baseline}",
    )
    return [Table("steps to the loss of the baseline, each at its own best rate", columns, lines)] if lines else []


def summary(rows: Sequence[TruthRow]) -> Table:
    """Return what the set holds: trainings and architectures by size, and what they cost."""
    lines = []
    for size, task, schedule in sorted({(row.size, row.task, row.schedule) for row in rows}):
        own = [row for row in rows if (row.size, row.task, row.schedule) == (size, task, schedule)]
        seeds = Counter(row.seed for row in own)
        lines.append(
            [
                *(size, task, schedule, len({row.fingerprint for row in own}), len(own)),
                *(sum(n for seed, n in seeds.items() if seed), sum(bool(row.failed) for row in own)),
                *(sum(row.trained_tokens for row in own), sum(row.cpu_seconds for row in own) / 3600),
            ]
        )
    columns = ("size", "task", "schedule", "architectures", "trainings", "further seeds", "failed", "tokens")
    return Table("truth set", (*columns, "core-hours"), lines)


def tiny_truth() -> list[TruthRow]:
    """Train a set of one architecture of no size in a temporary folder and return its rows."""
    listed = [Listed(pattern="FF", half=CHOOSING)]
    sizes = [TruthSize(active_params=2000, d_model=8, batch_size=2, valid_tokens=64)]
    with tempfile.TemporaryDirectory() as folder:
        spec = TruthSpec(
            architectures=listed,
            sizes=sizes,
            data={"kind": "stdlib", "max_bytes": 100_000},
            tokens_per_active_param=1.0,
            seq_len=16,
            rates=(0.01, 0.03),
            seeds=1,
        )
        return build_truth(spec, Path(folder) / "truth.csv", Path(folder), report=lambda text: None)


def _sizes(wanted: Sequence[int]) -> list[TruthSize]:
    """Return the sizes that are asked for, small ones first; none asked for: all. Raises ConfigError."""
    known = {size.active_params: size for size in SIZES}
    for size in wanted:
        if size not in known:
            raise ConfigError(
                f"bench sizes={list(wanted)} has {size}, which the truth set does not have; choose among "
                f"{', '.join(map(str, known))}",
                field="sizes",
                got=size,
                allowed=tuple(known),
            )
    return [size for active, size in known.items() if not wanted or active in wanted]
