"""What a suite found: times, ratios, goals and free tables, as people and as JSON read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hybridnas.bench.method import Spread, ratios
from hybridnas.errors import ConfigError

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


class Timed(NamedTuple):
    """Seconds of one form in one case; no spread where it could not run, and ``note`` says why."""

    case: str
    name: str
    spread: Spread | None
    note: str = ""


class Ratio(NamedTuple):
    """How many times longer (or larger) ``of`` is than ``over``, pair by pair."""

    case: str
    of: str
    over: str
    spread: Spread


class Goal(NamedTuple):
    """A ratio that was asked for, and what was found; ``met`` is None where nothing was measured."""

    what: str
    against: str
    rule: str  # "at least" or "at most"
    bound: float
    measured: Spread | None
    met: bool | None
    note: str = ""

    @property
    def words(self) -> str:
        return f"{self.rule} {self.bound:g}x"


class Table(NamedTuple):
    """Figures that are neither times of forms nor ratios."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]


@dataclass
class Result:
    """Everything that one suite found, in the order in which it was found."""

    suite: str
    timed: list[Timed] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)  # what stands at the top of the JSON file
    _times: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, case: str, times: Mapping[str, Sequence[float]], notes: Mapping[str, str] | None = None) -> None:
        """Take the times of one interleaved run."""
        for name, values in times.items():
            self._times[case, name] = list(values)
            self.timed.append(Timed(case, name, Spread.of(values), (notes or {}).get(name, "")))

    def missing(self, case: str, name: str, why: str) -> None:
        """Say that a form could not run, and why."""
        self.timed.append(Timed(case, name, None, why))

    def ratio(self, case: str, of: str, over: str) -> Spread | None:
        """Record ``of`` / ``over`` and return its spread; None, and nothing recorded, where one did not run."""
        pair = [self._times.get((case, name)) for name in (of, over)]
        if pair[0] is None or pair[1] is None:
            return None
        spread = Spread.of(ratios(pair[0], pair[1]))
        if not any(r[:3] == (case, of, over) for r in self.ratios):
            self.ratios.append(Ratio(case, of, over, spread))
        return spread

    def goal(self, rule: str, bound: float, *, case: str, of: str, over: str, what: str, against: str) -> None:
        """Hold the ratio ``of`` / ``over`` of a case against its goal."""
        spread = self.ratio(case, of, over)
        why = "" if spread is not None else self._why(case, of) or self._why(case, over) or "not measured"
        self.hold(rule, bound, spread, what=what, against=against, note=why)

    def hold(
        self, rule: str, bound: float, measured: Spread | None, *, what: str, against: str, note: str = ""
    ) -> None:
        """Hold a ratio against its goal by its median."""
        if rule not in ("at least", "at most"):
            raise ConfigError(f"a goal's rule is 'at least' or 'at most', got {rule!r}")
        met = None
        if measured is not None:
            met = measured.median >= bound if rule == "at least" else measured.median <= bound
        self.goals.append(Goal(what, against, rule, bound, measured, met, note))

    def _why(self, case: str, name: str) -> str:
        return next((t.note for t in self.timed if (t.case, t.name) == (case, name) and t.spread is None), "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "suite": self.suite,
            "seconds": self.seconds,
            "timed": [{**t._asdict(), "spread": _plain(t.spread)} for t in self.timed],
            "ratios": [{**r._asdict(), "spread": _plain(r.spread)} for r in self.ratios],
            "goals": [{**g._asdict(), "measured": _plain(g.measured), "goal": g.words} for g in self.goals],
            "tables": [{"title": t.title, "columns": list(t.columns), "rows": t.rows} for t in self.tables],
            "notes": self.notes,
            "files": self.files,
        }


def _plain(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else dict(spread._asdict())


def seconds_text(seconds: float) -> str:
    """Write a time in three figures: 0.0123 is 12.3 ms."""
    for scale, unit in _UNITS:
        if seconds >= scale:
            return f"{_three(seconds / scale)} {unit}"
    return f"{_three(seconds * 1e6)} us"


def ratio_text(spread: Spread | None) -> str:
    """Write a ratio with its quartiles: 5.91x (5.7-6.2); one pair has no spread."""
    if spread is None:
        return ""
    if spread.size == 1:
        return f"{_three(spread.median)}x (one pair)"
    return f"{_three(spread.median)}x ({_three(spread.q1)}-{_three(spread.q3)})"


def met_text(met: bool | None) -> str:
    """Write whether a goal is met; a goal without a measurement is neither."""
    return {True: "met", False: "not met", None: "not measured"}[met]


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def timed_rows(result: Result) -> list[list[str]]:
    """Return case, form, median, least, quartiles, rounds, note."""
    rows = []
    for case, name, spread, note in result.timed:
        if spread is None:
            rows.append([case, name, "", "", "", "", note])
            continue
        quartiles = f"{seconds_text(spread.q1)} - {seconds_text(spread.q3)}"
        rows.append(
            [case, name, seconds_text(spread.median), seconds_text(spread.low), quartiles, str(spread.size), note]
        )
    return rows


def ratio_rows(result: Result) -> list[list[str]]:
    """Return case, the two forms, and their ratio."""
    return [[r.case, f"{r.of} / {r.over}", ratio_text(r.spread)] for r in result.ratios]


def goal_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return what, against, goal, measured, whether met, note."""
    return [
        [g.what, g.against, g.words, ratio_text(g.measured), met_text(g.met), g.note]
        for result in results
        for g in result.goals
    ]
