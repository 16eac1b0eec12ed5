"""A study's limits in its report: which they are, who keeps them, how near the others come, what each limit costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.report.html import cell, difference
from hybridnas.report.sections import ReportInput, Section, state_of
from hybridnas.study.folder import read_study
from hybridnas.study.objectives import LIMITS, eligible, score
from hybridnas.study.records import COMPLETE, FAIL, INFEASIBLE, WORDS, TrialRecord
from hybridnas.units import human, human_bytes, several

_NAMES = {
    "params": "parameters",
    "active_params": "active parameters",
    "state_bytes": "of state",
    "ms_per_token": "ms to generate a token",
}


def read_limits(study_folder: Path) -> dict[str, float]:
    """Return the limits of a study by name, in the order of its settings; none where there is no study.json."""
    try:
        identity = read_study(study_folder).get("identity", {})
    except StudyError:
        return {}
    return {name: float(value) for name in LIMITS if isinstance(value := identity.get(name), (int, float))}


def words(limits: Mapping[str, float], length: int | None) -> str:
    """Return limits as people read them: ``at most 195 KiB of state at 4,096 tokens``; empty without any."""
    return " and ".join(_words(name, limit, length) for name, limit in limits.items())


def _words(name: str, limit: float, length: int | None) -> str:
    at = f" at {length:,} tokens" if LIMITS[name] == "state_bytes" and length else ""
    bound = "at least" if name.startswith("min_") else "at most"
    return f"{bound} {_written(name, limit)} {_NAMES.get(LIMITS[name], LIMITS[name].replace('_', ' '))}{at}"


def _written(name: str, value: float) -> str:
    if LIMITS[name] == "state_bytes":
        return human_bytes(value)
    return f"{value:.3g}" if LIMITS[name] == "ms_per_token" else human(value)


def value_of(record: TrialRecord, limit: str) -> float | None:
    """Return what a limit bounds of a trial, None where it was not measured."""
    name = LIMITS[limit]
    return state_of(record) if name == "state_bytes" else record.figures.get(name, record.cost.get(name))


def passed(record: TrialRecord, limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits that a trial passes, each with how far it is outside (above 1)."""
    values = {name: value for name in limits if (value := value_of(record, name)) is not None}
    shares = {
        name: limits[name] / max(value, 1e-9) if name.startswith("min_") else value / limits[name]
        for name, value in values.items()
    }
    return {name: share for name, share in shares.items() if share > 1}


def nearest(records: Iterable[TrialRecord], limits: Mapping[str, float]) -> tuple[TrialRecord, str] | None:
    """Return the trained trial that comes nearest to keeping all limits, and the limit that it passes most."""
    over = [(record, found) for record in records if record.state == COMPLETE and (found := passed(record, limits))]
    if not over:
        return None
    record, found = min(over, key=lambda one: (max(one[1].values()), one[0].number))
    return record, max(found, key=lambda name: found[name])


def nothing_keeps(records: Sequence[TrialRecord], limits: Mapping[str, float], length: int | None) -> str | None:
    """State that trials completed and none is within the limits, and by how much the nearest misses; else None."""
    done = [record for record in records if record.state == COMPLETE]
    found = nearest(done, limits)
    if found is None or any(map(eligible, done)):
        return None
    record, name = found
    value = value_of(record, name)
    assert value is not None
    trained = "the one architecture" if len(done) == 1 else f"the {len(done)} architectures"
    return (
        f"None of {trained} that completed keeps {words(limits, length)}; {record.name} comes nearest, "
        f"with {_written(name, value)}"
    )


def limits_section(given: ReportInput) -> Section | None:
    """Each limit with how many trials pass it, and what the best loss would be without it."""
    limits, length = given.limits, given.state_length
    if not limits:
        return None
    done = [record for record in given.records if record.state == COMPLETE]
    over = {record.number: passed(record, limits) for record in given.records}
    rows = []
    for name, limit in limits.items():
        drawn = sum(name in over[record.number] for record in given.records if record.state == INFEASIBLE)
        trained = sum(name in over[record.number] for record in done)
        free = min(
            (record for record in done if score(record) is not None and not set(over[record.number]) - {name}),
            key=lambda record: (score(record) or 0.0, record.number),
            default=None,
        )
        gap = None if free is None or given.best is None else (score(free) or 0.0) - (score(given.best) or 0.0)
        cost = "no winner to compare with" if gap is None else "nothing" if gap >= 0 else difference(gap)
        best = "" if free is None or free is given.best else f"{free.name}, {_written_at(free, name)}"
        cells = [cell(_words(name, limit, length), name, "text"), cell(str(drawn), drawn), cell(str(trained), trained)]
        rows.append({"trial": None, "style": "", "cells": [*cells, cell(best, best, "text"), cell(cost, gap)]})
    names = (
        ("limit", True), ("draws refused", False), ("trained outside, for comparison", False),
        ("best without this limit", True), ("its score, against the winner's", False),
    )  # fmt: skip
    table = {"columns": [{"name": name, "help": "", "text": text} for name, text in names], "rows": rows}
    intro = (
        "Only trials within all limits can win. Presets outside them are trained for comparison where that is asked."
    )
    return Section("Limits", intro, table=table)


def _written_at(record: TrialRecord, limit: str) -> str:
    value = value_of(record, limit)
    return "" if value is None else _written(limit, value)


def refusals(records: Iterable[TrialRecord]) -> Counter[str]:
    """Return why draws were refused, without the figures of each, and how often."""
    reasons = (record.reason or "no reason was recorded" for record in records if record.state == INFEASIBLE)
    return Counter(re.sub(r"=[\d.,e+]+ is (above|below)", r" is \1", reason) for reason in reasons)


def refused_words(records: Iterable[TrialRecord]) -> str:
    """Return how many draws were refused, and why, in one sentence; empty for none."""
    found = refusals(records)
    if not found:
        return ""
    first = ", ".join(f"{count} because {reason}" for reason, count in found.most_common(3))
    rest, count = sum(count for _, count in found.most_common()[3:]), sum(found.values())
    more = f", {rest} for other reasons" if rest else ""
    return f"{several(count, 'draw')} {'was' if count == 1 else 'were'} refused: {first}{more}."


def rows_of_refusals(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return failed and refused trials by state and reason: state, reason, count, the first numbers."""
    groups: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.state in (FAIL, INFEASIBLE):
            reason = next(iter(refusals([record])), record.reason or "no reason was recorded")
            groups.setdefault((WORDS[record.state], reason), []).append(record.number)
    return [
        {"state": state, "reason": reason, "count": len(numbers), "numbers": _listed(numbers)}
        for (state, reason), numbers in groups.items()
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown
