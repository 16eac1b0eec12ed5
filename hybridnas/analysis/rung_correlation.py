"""Rank correlation between the scores at each rung and those of full trainings: whether early scores predict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridnas.study.records import COMPLETE, TrialRecord, clean_points

LEAST = 4  # fewer pairs say nothing about an order


@dataclass(frozen=True)
class Agreement:
    """How a rung orders architectures beside the full run; None where too few, or all equal, were there."""

    tokens: int  # of the rung
    full: int  # of the full run
    n: int  # architectures that have both
    spearman: float | None
    kendall: float | None  # tau-b


def agreements(curves: Iterable[Mapping[int, float]], points: Sequence[int] | None = None) -> list[Agreement]:
    """Correlate the scores at each of ``points`` but the last with those at the last; none: all points of the curves.

    A curve maps training tokens to a score. Those without a finite score at both places are left out of that pair,
    so ``n`` is stated: in a study with a pruner only the trials that were not stopped have a full score, and their
    correlation is not that of all candidates.
    """
    known = [dict(curve) for curve in curves]
    marks = sorted(points if points is not None else {point for curve in known for point in curve})
    found = []
    for mark in marks[:-1]:
        both = [(curve[mark], curve[marks[-1]]) for curve in known if mark in curve and marks[-1] in curve]
        pairs = [pair for pair in both if all(map(math.isfinite, pair))]
        spearman, kendall = rank_correlation(*zip(*pairs, strict=True)) if len(pairs) >= LEAST else (None, None)
        found.append(Agreement(int(mark), int(marks[-1]), len(pairs), spearman, kendall))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float | None, float | None]:
    """Return Spearman's rho and Kendall's tau-b of two score lists, None where one of them is constant."""
    from scipy import stats

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None, None
    return float(stats.spearmanr(a, b).statistic), float(stats.kendalltau(a, b).statistic)


def study_agreements(records: Iterable[TrialRecord]) -> list[Agreement]:
    """Return the agreement of a study's rungs with its full runs, from its completed trials, each architecture once."""
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        if record.state == COMPLETE:
            curve = {int(tokens): loss for tokens, loss in clean_points(record.rungs)}
            curves.setdefault(record.fingerprint or str(record.number), curve)
    return agreements(curves.values()) if curves else []


def caveat(found: Sequence[Agreement], pruned: int = 0) -> str:
    """State over how many trials correlations were computed, and how leaving out the stopped ones biases them."""
    if not any(one.spearman is not None for one in found):
        return f"fewer than {LEAST} trials were trained to the end at more than one rung: no correlation can be stated"
    n = max(one.n for one in found)
    text = f"over the {n} trials that were trained to the end"
    if pruned:
        text += (
            f"; the {pruned} that were stopped early have no full score, so this is not the correlation over all "
            f"candidates: a narrower range of losses lowers it, presets that always run to the end can raise it"
        )
    return text
