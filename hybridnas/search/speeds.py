"""Speeds that were not measured yet: a ridge regression on those that were, refined by every measurement.

Times add up over layers, so a time per token (of a speed, its inverse) is predicted from the counts of the letters and
from the sizes (parameters, FLOPs, state); prompts and batches have one length in a study. The error is the root mean
square of what each measurement differs from the prediction of all the others. It is made from the records alone, so a
study that goes on, or another worker, draws the same; ``STUDY/measured/predictor.json`` shows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.arch.pattern import parse
from hybridnas.files import write_json
from hybridnas.study.objectives import LIMITS, MEASURED, OBJECTIVES
from hybridnas.study.records import DUPLICATE, TrialRecord

if TYPE_CHECKING:
    from hybridnas.search.sampling.candidates import Candidate

FEWEST = 8  # measurements before a prediction refuses anything
ERRORS = 3.0  # a candidate is refused where the limit lies farther from its prediction than this [errors]
_LEAST_ERROR = 0.05  # a fit through few points may show less than a measurement's own spread [of the mean time]
_RIDGE = 1.0  # penalty of a standardized weight
_SIZES = ("params", "active_params", "flops_per_token", "state_bytes")
FILE = "measured/predictor.json"


@dataclass(frozen=True)
class Predictor:
    """A fitted regression of one figure, as time per token in units of the mean of those that were measured."""

    figure: str
    mean: float  # time per token: milliseconds, or seconds of a speed
    weights: Mapping[str, float]  # by feature
    center: Mapping[str, float]  # mean of each feature
    inverse: Sequence[Sequence[float]]  # of the penalized moments of the features, in the order of ``center``
    error: float  # root mean square of the leave-one-out residuals [of the mean time]
    n: int  # measurements

    def time(self, pattern: str, cost: Mapping[str, float]) -> tuple[float, float]:
        """Return the time per token that is expected and its error, larger for what is unlike all that was measured."""
        known = features(pattern, cost)
        away = {name: known.get(name, 0.0) - mean for name, mean in self.center.items()}
        leverage = 1 / self.n + sum(
            a * sum(b * c for b, c in zip(away.values(), row, strict=True))
            for a, row in zip(away.values(), self.inverse, strict=True)
        )
        expected = 1 + sum(self.weights[name] * a for name, a in away.items())
        return self.mean * expected, self.mean * max(self.error, _LEAST_ERROR) * math.sqrt(1 + leverage)

    def passes(self, bound: float, pattern: str, cost: Mapping[str, float]) -> bool:
        """Whether an architecture would pass a limit even if the prediction erred by ``ERRORS`` errors in its favor."""
        expected, error = self.time(pattern, cost)
        return expected - ERRORS * error > _time(self.figure, bound)


def _time(figure: str, value: float) -> float:
    return 1 / value if OBJECTIVES[figure].maximize else value


def features(pattern: str, cost: Mapping[str, float]) -> dict[str, float]:
    """Return what a prediction is made from: letters by count, and sizes."""
    letters = Counter(slot.letter for slot in parse(pattern).slots)
    return {**letters, **{name: float(cost[name]) for name in _SIZES}}


def fit(figure: str, rows: Sequence[tuple[Mapping[str, float], float]]) -> Predictor:
    """Fit a figure to features; at least two rows."""
    import numpy as np

    names = sorted({name for known, _ in rows for name in known})
    x = np.array([[known.get(name, 0.0) for name in names] for known, _ in rows], dtype=float)
    times = np.array([_time(figure, value) for _, value in rows], dtype=float)
    y = times / times.mean() - 1
    center, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale < 1e-9 * np.maximum(1.0, np.abs(center))] = np.inf  # what all have alike tells nothing
    z = (x - center) / scale
    inverse = np.linalg.inv(z.T @ z + _RIDGE * np.eye(len(names)))
    weights = inverse @ z.T @ y
    own = np.einsum("ij,jk,ik->i", z, inverse, z) + 1 / len(rows)  # the diagonal of the hat matrix
    residuals = (y - z @ weights) / np.maximum(1 - own, 1e-6)
    return Predictor(
        figure,
        float(times.mean()),
        {name: float(weight / by) for name, weight, by in zip(names, weights, scale, strict=True)},
        {name: float(at) for name, at in zip(names, center, strict=True)},
        (inverse / np.outer(scale, scale)).tolist(),
        float(np.sqrt(np.mean(residuals**2))),
        len(rows),
    )


def predictors(records: Iterable[TrialRecord], figures: Iterable[str]) -> dict[str, Predictor]:
    """Return the predictor of each figure that enough records have; each architecture counts once."""
    known = {record.fingerprint: record for record in records if record.fingerprint and record.state != DUPLICATE}
    found = {}
    for figure in figures:
        measured = [one for one in known.values() if figure in one.figures]
        if len(measured) >= FEWEST:
            found[figure] = fit(figure, [(features(one.pattern, one.cost), one.figures[figure]) for one in measured])
    return found


def measured_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits that need a measurement."""
    return {name: bound for name, bound in limits.items() if OBJECTIVES[LIMITS[name]].kind == MEASURED}


def outlook(records: Mapping[int, TrialRecord], limits: Mapping[str, float]) -> Callable[[Candidate], str | None]:
    """Return what names the measured limit that a candidate will pass in all likelihood, or None."""
    asked = measured_limits(limits)
    known = predictors(records.values(), {LIMITS[name] for name in asked}) if asked else {}

    def unlikely(candidate: Candidate) -> str | None:
        for name, bound in asked.items():
            predictor = known.get(LIMITS[name])
            if predictor is not None and predictor.passes(bound, candidate.pattern, candidate.cost):
                return f"{name} (predicted)"
        return None

    return unlikely


def write(study: Path, records: Mapping[int, TrialRecord], figures: Iterable[str]) -> None:
    """Write the predictors as the records have them into the study's folder."""
    found = predictors(records.values(), figures)
    if found:
        (study / FILE).parent.mkdir(exist_ok=True)
        write_json(study / FILE, {name: vars(predictor) for name, predictor in found.items()})
