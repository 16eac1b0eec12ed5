"""Rank correlations between the score at every measured point and that of the full training."""

from __future__ import annotations

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result
from hybridnas.bench.suites.table import fidelity, summary
from hybridnas.errors import StudyError
from hybridnas.search.table import load_table
from hybridnas.search_spaces.space import load_space
from hybridnas.tabular.build import tiny_table


def run(config: BenchConfig) -> Result:
    """State Spearman's and Kendall's correlations over the architectures of ``space=``'s table."""
    result = Result("fidelity")
    try:
        table = tiny_table() if config.tiny else load_table(load_space(config.space or "tabular"))[1]
    except StudyError as error:
        if config.suite != "all":
            raise
        result.notes.append(f"not run: {error}")
        return result
    result.tables += [summary(table), fidelity(table)]
    return result
