"""A study's limits in its report: which they are, who keeps them, how near the others come, what each limit costs.

What the limits did is found by :mod:`hybridnas.analysis.limits`; this file puts it into words and a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.analysis.limits import LimitsReport, Price, limits_of, limits_report, misses, remarks, values_of
from hybridnas.report.html import cell, difference
from hybridnas.report.sections import ReportInput, Section
from hybridnas.study.folder import read_study
from hybridnas.study.objectives import LIMITS, OF_LENGTH
from hybridnas.study.records import COMPLETE, FAIL, INFEASIBLE, WORDS, TrialRecord
from hybridnas.units import human, human_bytes, several

_NAMES = {
    "params": "parameters",
    "active_params": "active parameters",
    "flops_per_token": "FLOPs per token",
    "state_bytes": "of state",
    "ms_per_token": "ms to generate a token",
    "train_tokens_per_second": "tokens/s while training",
    "prefill_tokens_per_second": "tokens/s while reading prompts",
    "decode_tokens_per_second": "tokens/s while generating",
}


def read_limits(study_folder: Path) -> dict[str, float]:
    """Return the limits of a study by name, in the order of its settings; none where there is no study.json.

    Raises StudyError for a limit of a newer version.
    """
    if not (study_folder / "study.json").is_file():
        return {}
    return limits_of(read_study(study_folder))


def words(limits: Mapping[str, float], length: int | None) -> str:
    """Return limits as people read them: ``at most 195 KiB of state at 4,096 tokens``; empty without any."""
    return " and ".join(_words(name, limit, length) for name, limit in limits.items())


def _words(name: str, limit: float, length: int | None) -> str:
    at = f" at {length:,} tokens" if name in OF_LENGTH and length else ""
    return f"at {'least' if name.startswith('min_') else 'most'} {_written(name, limit)} {_NAMES[LIMITS[name]]}{at}"


def _written(name: str, value: float) -> str:
    if LIMITS[name] == "state_bytes":
        return human_bytes(value)
    return f"{value:.3g}" if LIMITS[name] == "ms_per_token" else human(value)


def nothing_keeps(records: Sequence[TrialRecord], limits: Mapping[str, float], length: int | None) -> str | None:
    """State that trials completed and none is within the limits, and by how much the nearest misses; else None."""
    done = [record for record in records if record.state == COMPLETE]
    found = limits_report(done, limits, length)
    if found.winner is not None or found.nearest is None:
        return None
    miss = found.nearest
    trained = "the one architecture" if len(done) == 1 else f"the {len(done)} architectures"
    return (
        f"None of {trained} that completed keeps {words(limits, length)}; {miss.record.name} comes nearest, "
        f"with {_written(miss.limit, miss.value)}"
    )


def limits_section(given: ReportInput) -> Section | None:
    """Each limit with how many trials it refused, and what the best score would be without it."""
    found = limits_report(given.records, given.limits, given.state_length)
    if not given.limits:
        return None
    names = (
        ("limit", True), ("draws refused", False), ("trained outside, for comparison", False),
        ("best without this limit", True), ("its score, against the winner's", False),
    )  # fmt: skip
    table = {
        "columns": [{"name": name, "help": "", "text": text} for name, text in names],
        "rows": [_row(price, found, given) for price in found.prices],
    }
    intro = "Only trials within all limits can win; presets outside them may be trained for comparison."
    return Section("Limits", intro, table=table, notes=[f"{text[0].upper()}{text[1:]}." for text in remarks(found)])


def _row(price: Price, found: LimitsReport, given: ReportInput) -> dict[str, Any]:
    name, best = price.limit, price.best
    refused = sum(count for rule, count in found.refused.items() if rule.split(" ")[0] == name)
    done = [record for record in given.records if record.state == COMPLETE]
    trained = sum(name in {miss.limit for miss in misses(record, given.limits)} for record in done)
    cost = "nothing" if best is None or (price.loss is not None and price.loss >= 0) else difference(price.loss)
    outside = "" if best is None else f"{best.name}, {_written(name, values_of(best)[LIMITS[name]])}"
    cells = [
        cell(_words(name, given.limits[name], given.state_length), name, "text"),
        cell(str(refused), refused),
        cell(str(trained), trained),
        cell(outside, outside, "text"),
        cell(cost or "no winner to compare with", price.loss),
    ]
    return {"trial": None, "style": "", "cells": cells}


def refused_words(records: Sequence[TrialRecord], limits: Mapping[str, float]) -> str:
    """Return how many draws were refused before any training, by the limit or rule; empty for none."""
    found = limits_report(records, limits).refused
    total = sum(found.values())
    listed = ", ".join(f"{name} {count}" for name, count in sorted(found.items(), key=lambda item: -item[1]))
    return f"{several(total, 'draw')} {'was' if total == 1 else 'were'} refused: {listed}." if total else ""


def rows_of_refusals(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return failed and refused trials by state and reason: state, reason, count, the first numbers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.state in (FAIL, INFEASIBLE):
            reason = record.reason or "no reason was recorded"
            if record.state == INFEASIBLE:  # the figures of each would make a row of each
                reason = re.sub(r"=[\d.,e+]+ is (above|below)", r" is \1", reason)
            groups.setdefault((WORDS[record.state], reason), []).append(record.number)
    return [
        {"state": state, "reason": reason, "count": len(numbers), "numbers": _listed(numbers)}
        for (state, reason), numbers in groups.items()
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown
