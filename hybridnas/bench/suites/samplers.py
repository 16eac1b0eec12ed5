"""Which sampler finds the best architectures first: hundreds of searches on a table, with each sampler and pruner.

A search here is that of ``python -m hybridnas.search``: the same samplers, pruners and promotions, on scores that are
looked up. It reaches the best 1 % when an architecture trained to the end has one of the best scores of the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridnas.analysis.rung_correlation import agreements
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites.table import fidelity
from hybridnas.errors import StudyError
from hybridnas.hardware import usable_cores
from hybridnas.search.config import PRUNERS, SAMPLERS, USUAL_SAMPLER, SearchConfig
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.table import load_table
from hybridnas.search_spaces.space import Scale, Space, load_space
from hybridnas.tabular.build import architectures
from hybridnas.tabular.simulate import Course, Limits, Scores, simulate

COMPARED = tuple(name for name in SAMPLERS if name != "bruteforce")
SLOW = {"gp": 20}  # sampler -> one of so many repeats, each ended when it arrives: a draw takes a second or more
FIRST_SEED = 1000  # of the searches: those below chose population, rungs and default, so they measure nothing
LONGEST = 1.2  # a search ends unsuccessfully after as many full trainings as this many times the architectures
POINTS = (4, 8, 16, 32, 64)  # at which regret is stated [tokens of full trainings]; who is slow ends at the last
_RESAMPLES = 2000
_COLOURS = {"tpe": "C0", "evolution": "C1", "nsga2": "C2", "gp": "C4", "random": "0.45"}


class Field(NamedTuple):
    """Where searches compete: scores, candidates, and the rungs in training tokens."""

    scores: Scores
    candidates: Candidates
    rungs: tuple[int, ...]
    reduction: int

    @property
    def full(self) -> int:
        return self.rungs[-1]

    def finals(self) -> list[float]:
        """Return the full scores, best first."""
        return sorted(curve[self.full] for curve in self.scores.values() if self.full in curve)

    @property
    def target(self) -> float:
        """The worst score of the best 1 %, rounded up to whole architectures."""
        finals = self.finals()
        return finals[math.ceil(len(finals) / 100) - 1]


def run(config: BenchConfig) -> Result:
    """Run the searches, state tokens to the best 1 % and regret with intervals, and draw both beside ``out``."""
    result = Result("samplers")
    field = _toy() if config.tiny else _from_table(config, result)
    if field is None:
        return result
    courses = _courses(field, config.repeats or config.pick(100, 10, 2), 1 if config.tiny else usable_cores())
    _state(result, field, courses)
    for what in ("tokens", "trials"):
        target = config.beside(f"-regret-{what}.png")
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(field, courses, what, target)
            result.files.append(str(target))
    return result


def _from_table(config: BenchConfig, result: Result) -> Field | None:
    space = load_space(config.space or "tabular")
    try:
        spec, table = load_table(space)
    except StudyError as error:
        if config.suite != "all":
            raise
        result.notes.append(f"not run: {error}")
        return None
    scale = spec.budget.scale(256)  # the vocabulary is no part of what is matched
    target = space.target(scale)
    rungs = spec.budget.rung_tokens(target)
    candidates = Candidates(space, scale)
    # The table's own names hold the vocabulary of its data; choices are what both know.
    scores = {candidates.recorded(row.choices).key: row.losses for row in table.firsts()}
    whole = len(architectures(space, scale))
    result.facts["table"] = {"path": spec.path, "architectures": len(scores), "of": whole, "runs": len(table.rows)}
    result.facts["preliminary"] = len(scores) < whole
    if len(scores) < whole:
        result.notes.append(f"PRELIMINARY: the table has {len(scores)} of {whole} architectures")
    sheet = fidelity(table)
    result.tables.append(sheet)
    result.facts["fidelity"] = [dict(zip(sheet.columns, row, strict=True)) for row in sheet.rows]
    _hold_fidelity(result, table.firsts(), rungs)
    return Field(scores, candidates, rungs, spec.budget.reduction)


def _hold_fidelity(result: Result, rows: Iterable[Any], rungs: Sequence[int]) -> None:
    """Hold the rank correlation of the rung that ends most trials, the first, against its goal."""
    found = agreements((row.losses for row in rows if not row.failed), rungs)
    rho = found[0].spearman if found else None
    spread = None if rho is None else Spread.of([rho])
    note = "" if spread is not None else "too few architectures"
    what, against = f"Spearman of the rung at {rungs[0]:,} tokens", "the full score"
    result.hold("at least", 0.9, spread, what=what, against=against, note=note)


def _courses(field: Field, repeats: int, processes: int) -> dict[tuple[str, str], list[Course]]:
    """Return all searches by sampler and pruner; the slowest are begun first, so that no process ends much later."""
    asked = [
        (sampler, pruner, seed)
        for sampler in sorted(COMPARED, key=lambda name: (-SLOW.get(name, 1), name != "tpe"))
        for pruner in PRUNERS
        for seed in range(FIRST_SEED, FIRST_SEED + max(2, repeats // SLOW.get(sampler, 1)))
    ]
    if processes == 1:
        done = [_course(field, one) for one in asked]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(partial(_course, field), asked, chunksize=5))
    found: dict[tuple[str, str], list[Course]] = {(name, pruner): [] for name in COMPARED for pruner in PRUNERS}
    for course in done:
        found[course.sampler, course.pruner].append(course)
    return found


def _course(field: Field, asked: tuple[str, str, int]) -> Course:
    sampler, pruner, seed = asked
    most, enough = (POINTS[-1], 0) if sampler in SLOW else (LONGEST * len(field.scores), POINTS[-1])
    limits = Limits(most=most * field.full, enough=enough * field.full, target=field.target)
    return simulate(
        field.scores,
        field.candidates,
        sampler,
        pruner,
        rungs=field.rungs,
        reduction=field.reduction,
        seed=seed,
        limits=limits,
    )


def _state(result: Result, field: Field, courses: dict[tuple[str, str], list[Course]]) -> None:
    """Put figures, intervals, ratios and the goal into the result."""
    usual = {item.name: item.default for item in dataclasses.fields(SearchConfig)}
    sampler, pruner = USUAL_SAMPLER, str(usual["pruner"])
    reached = {pair: np.array([one.tokens_to(field.target) for one in some]) for pair, some in courses.items()}
    by_pruner: dict[str, dict[str, Any]] = {name: {} for name in PRUNERS}
    rows: list[list[Any]] = []
    for (name, stop), tokens in reached.items():
        low, high = interval(tokens)
        alike, plain = (quotient(tokens, reached["random", other]) for other in (stop, "none"))
        by_pruner[stop][name] = {
            "median": _finite(np.median(tokens)),
            "interval": [_finite(low), _finite(high)],
            "full_trainings": _finite(np.median(tokens) / field.full),
            "reached": float(np.isfinite(tokens).mean()),
            "repeats": len(tokens),
            "to_random_same_pruner": alike,
            "to_random_without_pruner": plain,
            "redrawn_per_trial": sum(c.redrawn for c in courses[name, stop])
            / max(1, sum(c.trials for c in courses[name, stop])),
            "regret_at": _regrets(field, courses[name, stop]),
        }
        trials = [next((b for b, _, v in one.found if v <= field.target), math.inf) for one in courses[name, stop]]
        median = _finite(np.median(tokens) / field.full)
        begun = _finite(float(np.median(trials)))
        ends = _range(low, high, field.full)
        rows.append([name, stop, median, ends, begun, _words(alike), _words(plain), len(tokens)])
    rows.sort(key=lambda row: math.inf if row[2] is None else row[2])
    columns = (
        *("sampler", "pruner", "full trainings to the best 1 %", "95 % interval", "trials begun"),
        *("to random, same pruner", "to random, no pruner", "repeats"),
    )
    title = f"samplers: medians until one of the best {math.ceil(len(field.finals()) / 100)} is trained to the end"
    result.tables.append(Table(title, columns, rows))
    result.facts |= {
        "default": sampler,
        "default_pruner": pruner,
        "tokens_to_best_1pct": {name: by_pruner[pruner][name]["median"] for name in COMPARED},
        "random_without_pruner": by_pruner["none"]["random"]["median"],
        "tokens_of_a_full_training": field.full,
        "best_1pct": {"architectures": math.ceil(len(field.finals()) / 100), "score": field.target},
        "by_pruner": by_pruner,
    }
    best = min(reached, key=lambda pair: float(np.median(reached[pair])))
    result.notes.append(f"fastest: {best[0]} with {best[1]}; the default is {sampler} with {pruner}")
    for words, other in (("the same pruner", pruner), ("no pruner", "none")):
        found = quotient(reached[sampler, pruner], reached["random", other])
        spread = None if found is None else Spread(found[0], found[1], found[1], found[2], found[2], 2)
        note = "" if spread is not None else "too few searches arrived"
        what, against = f"{sampler} with {pruner}: tokens to the best 1 %", f"random with {words}"
        result.hold("at most", 0.5, spread, what=what, against=against, note=note)


def _resampled(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return medians of bootstrap samples; the same values give the same ones."""
    picks = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    medians: np.ndarray[Any, Any] = _median(values[picks])
    return medians


def _median(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return medians along the last axis; between two values the upper one, so that infinities do no harm."""
    medians: np.ndarray[Any, Any] = np.sort(values, axis=-1)[..., values.shape[-1] // 2]
    return medians


def interval(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    medians = np.sort(_resampled(values))
    return float(medians[int(0.025 * len(medians))]), float(medians[int(0.975 * len(medians))])


def quotient(of: np.ndarray[Any, Any], over: np.ndarray[Any, Any]) -> list[float] | None:
    """Return the ratio of two medians with its 95 % bootstrap interval; None where one of them is infinite.

    Searches that never arrived count as infinite: an upper end that is infinite is reported as the largest finite one.
    """
    ratio = float(_median(of) / _median(over)) if np.isfinite(_median(over)) else math.nan
    if not math.isfinite(ratio):
        return None
    rng = np.random.default_rng(1)
    below = _median(over[rng.integers(0, len(over), (_RESAMPLES, len(over)))])
    with np.errstate(invalid="ignore"):
        all_of_them = np.sort(_resampled(of) / below)
    found = all_of_them[np.isfinite(all_of_them)]
    return [ratio, float(found[int(0.025 * len(found))]), float(found[int(0.975 * len(found))])]


def _regrets(field: Field, courses: Sequence[Course]) -> dict[str, dict[str, float | None]]:
    """Return median regret [nats] after so many full trainings' tokens, with its interval."""
    found: dict[str, dict[str, float | None]] = {}
    best = field.finals()[0]
    for point in POINTS:
        values = np.array([one.best_at(tokens=point * field.full) - best for one in courses])
        low, high = interval(values)
        found[str(point)] = {"median": _finite(_median(values)), "low": _finite(low), "high": _finite(high)}
    return found


def draw(field: Field, courses: dict[tuple[str, str], list[Course]], what: str, target: Path) -> None:
    """Draw median regret with 95 % bands against trained tokens or trials begun: one panel a pruner."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PRUNERS), sharey=True)
    finals = field.finals()
    at = np.unique(np.geomspace(1, POINTS[-1], 60).round(2))
    ticks = [1, 2, *POINTS]
    for panel, pruner in zip(panels, PRUNERS, strict=True):
        for sampler in COMPARED:
            some = courses[sampler, pruner]
            scale = {"tokens": field.full, "trials": 1}[what]
            regret_RP = np.array([[one.best_at(**{what: x * scale}) - finals[0] for x in at] for one in some])
            middle = _median(regret_RP.T)
            bands = np.array([interval(regret_RP[:, i]) for i in range(len(at))])
            shown = np.isfinite(middle)
            colour = _COLOURS[sampler]
            panel.plot(at[shown], middle[shown], color=colour, label=sampler, linewidth=1.6)
            high = np.where(np.isfinite(bands[:, 1]), bands[:, 1], finals[-1] - finals[0])
            panel.fill_between(at[shown], bands[shown, 0], high[shown], color=colour, alpha=0.15, linewidth=0)
        panel.axhline(field.target - finals[0], color="0.7", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xlim(1, POINTS[-1])
        panel.set_xticks(ticks, [str(tick) for tick in ticks])
        panel.set_title(f"pruner: {pruner}", fontsize=10)
        panel.set_xlabel("trained tokens [full trainings]" if what == "tokens" else "trials begun")
        panel.set_ylim(0, finals[len(finals) // 2] - finals[0])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, linewidth=0.4, alpha=0.5)
    panels[0].set_ylabel("regret: best full score so far\nminus the table's best [nats]")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(target, dpi=160)


def _toy() -> Field:
    """Return a made-up landscape of eight architectures: a check that everything runs, no result."""
    space = Space.from_mapping({"name": "toy", "letters": ["M", "F"], "motif_length": [3], "baselines": []})
    candidates = Candidates(space, Scale(d_model=8, depth=3, multiple=1))
    rungs = (100, 300, 900)
    scores = {}
    for number, motif in enumerate(itertools.product("MF", repeat=3)):
        name = candidates.of({f"slot{i}": letter for i, letter in enumerate(motif)}).key
        final = 2.0 - 0.3 * motif.count("M") + 0.01 * number
        scores[name] = {rung: final + 90 / rung for rung in rungs}
    feasible = {name: curve for name, curve in scores.items() if not name.startswith("infeasible")}
    return Field(feasible, candidates, rungs, 3)


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _range(low: float, high: float, unit: float) -> str:
    ends = (f"{end / unit:.3g}" if math.isfinite(end) else "never" for end in (low, high))
    return " to ".join(ends)


def _words(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})"
