"""What the limits of a study did: who won within them, by how much others missed, and what each limit cost.

Everything is read from the records and from the limits in ``study.json``; nothing is trained or measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hybridnas.analysis.ranking import winner
from hybridnas.errors import StudyError
from hybridnas.study.objectives import LIMITS, MEASURED, OBJECTIVES, OF_LENGTH, broken, counted, score
from hybridnas.study.records import COMPLETE, INFEASIBLE, TrialRecord
from hybridnas.units import several


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A record that passes one limit, and by how much."""

    record: TrialRecord
    limit: str
    bound: float
    value: float

    @property
    def share(self) -> float:
        """By how much of the bound the value passes it [1]."""
        return abs(self.value - self.bound) / self.bound

    @property
    def factor(self) -> float:
        """How many times the bound the value is, or the bound the value, whichever is more [1]."""
        if self.value <= 0.0:
            return math.inf
        return max(self.value / self.bound, self.bound / self.value)


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a limit cost: the best trained record that keeps all other limits."""

    limit: str
    best: TrialRecord | None  # None: nothing outside this limit alone was trained
    loss: float | None  # its score minus the winner's, less is better; None where one of the two is missing


@dataclass(frozen=True, kw_only=True)
class LimitsReport:
    """What a report and the terminal say of a study's limits."""

    limits: Mapping[str, float]  # name -> bound
    state_length: int | None  # context at which state, prefill and generation count [tokens]
    winner: TrialRecord | None  # within the limits
    nearest: Miss | None  # of all records outside the limits, the one that misses least in its worst limit
    prices: tuple[Price, ...]  # one for each limit
    refused: Mapping[str, int]  # draws that left no trained record, by the rule or limit that they broke
    marginal: tuple[TrialRecord, ...]  # trained records that keep a measured limit within its spread alone
    references: tuple[TrialRecord, ...]  # presets outside the limits that were not trained


def limits_of(study: Mapping[str, object]) -> dict[str, float]:
    """Return the limits that a study (its ``study.json``) was searched within.

    Raises StudyError for a limit that this version does not know.
    """
    identity = study.get("identity", {})
    given = identity if isinstance(identity, Mapping) else {}
    for name, value in given.items():
        if str(name).startswith(("max_", "min_")) and value is not None and name not in LIMITS:
            raise StudyError(
                f"study {study.get('study')!r} has the limit {name}={value}, which this version does not know; use the "
                f"version that wrote it",
                field=str(name),
                got=value,
                allowed=tuple(LIMITS),
            )
    return {name: float(value) for name in LIMITS if (value := given.get(name)) is not None}


def values_of(record: TrialRecord) -> dict[str, float]:
    """Return what is known of a record beside its training: counts, the state at the length asked for, speeds."""
    known = counted(record.cost, record.cost.get("state_bytes", 0.0)) if record.cost else {}
    return {**known, **record.figures}


def misses(record: TrialRecord, limits: Mapping[str, float]) -> list[Miss]:
    """Return the limits that a record passes; those that it keeps within a measurement's spread are not among them."""
    values = values_of(record)
    known = {name: bound for name, bound in limits.items() if LIMITS[name] in values}
    return [
        Miss(record=record, limit=name, bound=limits[name], value=values[LIMITS[name]])
        for name in broken(known, values)
        if name not in record.within_spread
    ]


def limits_report(
    records: Iterable[TrialRecord], limits: Mapping[str, float], state_length: int | None = None
) -> LimitsReport:
    """Return what the limits did to a study: of these records, within these limits."""
    known = list(records)
    outside = {record.number: found for record in known if (found := misses(record, limits))}
    best = winner(known)
    worst = [max(found, key=lambda miss: miss.share) for found in outside.values()]
    trained = [record for record in known if record.state == COMPLETE and score(record) is not None]
    refused: Counter[str] = Counter()
    for record in known:
        refused.update(record.refused)
        if record.state == INFEASIBLE and record.preset is None:
            refused.update([miss.limit for miss in outside.get(record.number, [])][:1])
    return LimitsReport(
        limits=dict(limits),
        state_length=state_length,
        winner=best,
        nearest=min(worst, key=lambda miss: miss.share, default=None),
        prices=tuple(_price(name, trained, outside, best) for name in limits),
        refused=dict(refused),
        marginal=tuple(record for record in trained if record.within_spread),
        references=tuple(record for record in known if record.state == INFEASIBLE and record.preset is not None),
    )


def _price(
    limit: str, trained: Iterable[TrialRecord], outside: Mapping[int, list[Miss]], best: TrialRecord | None
) -> Price:
    """Return what one limit cost: the best of those that pass this limit alone, beside the winner."""
    alone = [one for one in trained if [miss.limit for miss in outside.get(one.number, [])] == [limit]]
    found = min(alone, key=lambda one: (score(one), one.number), default=None)
    mine, theirs = (None if one is None else score(one) for one in (best, found))
    return Price(limit=limit, best=found, loss=None if mine is None or theirs is None else theirs - mine)


def sentences(report: LimitsReport) -> list[str]:
    """Return the report in sentences, for a terminal and a page: the answer first; nothing for a study without limits.

    A study with rules alone (such as a required letter) gets the sentence on refused draws.
    """
    found = []
    if report.limits:
        within = " and ".join(stated(name, bound, report.state_length) for name, bound in report.limits.items())
        if report.winner is None:
            found.append(f"nothing that was trained to the end keeps {within}")
            if report.nearest is not None:
                miss = report.nearest
                found.append(
                    f"nearest: {miss.record.name}, {LIMITS[miss.limit]} {miss.value:,.6g}, {miss.share:.1%} outside "
                    f"{miss.limit}={miss.bound:,.6g}"
                )
        else:
            measured = [
                f"{figure} {report.winner.figures[figure]:,.4g}"
                for figure in measured_figures(report.limits)
                if figure in report.winner.figures
            ]
            with_what = f", measured {', '.join(measured)}" if measured else ""
            found.append(f"within {within}: {report.winner.name}, trial {report.winner.number}{with_what}")
    for price in report.prices:
        if price.best is not None and price.loss is not None:
            change = "better" if price.loss < 0 else "worse"
            found.append(
                f"without {price.limit} the best would be {price.best.name}, trial {price.best.number}, "
                f"{abs(price.loss):.4f} {change}"
            )
    if report.refused:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(report.refused.items()))
        found.append(f"{several(sum(report.refused.values()), 'draw')} refused before training: {listed}")
    return [*found, *remarks(report)]


def measured_figures(limits: Iterable[str]) -> list[str]:
    """Return the figures of those limits that are measured here."""
    return [LIMITS[name] for name in limits if OBJECTIVES[LIMITS[name]].kind == MEASURED]


def remarks(report: LimitsReport) -> list[str]:
    """Return the sentences on presets that were not trained, and on trials that a measurement's spread lets through."""
    found = []
    if report.references:
        names = ", ".join(record.name for record in report.references)
        found.append(f"outside the limits, listed with their costs and not trained: {names}")
    if report.marginal:
        names = ", ".join(f"trial {record.number}" for record in report.marginal)
        found.append(f"met within the spread of the measurement alone: {names}")
    return found


def stated(name: str, bound: float, state_length: int | None) -> str:
    """Return a limit as it is said: its name, its bound, and the context at which it holds where that matters."""
    at = f" at {state_length:,} tokens" if state_length is not None and name in OF_LENGTH else ""
    unit = "" if OBJECTIVES[LIMITS[name]].kind != MEASURED else " measured here"
    return f"{name}={bound:,.6g}{at}{unit}"
