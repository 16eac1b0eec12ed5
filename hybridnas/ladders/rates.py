"""Each architecture's own multiple of the law's rate: the best of those tried at the smallest size."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hybridnas.ladders.plan import LadderRun, Plan
from hybridnas.ladders.rows import ended
from hybridnas.search.rates import rate_beyond
from hybridnas.train.records import read_evals

MOST_BEYOND = 2  # multiples that are tried beyond an end of ``rates=`` [count]


def tuning_runs(plan: Plan) -> list[LadderRun]:
    """Return the runs that choose the rates, those beyond ``rates=`` as far as what has ended asks for them."""
    rates = plan.config.rates
    if len(rates) == 1:
        return []
    runs = [plan.tuning(name, rate) for rate in rates for name in plan.archs]
    for name in plan.archs:
        losses = {run.rate: _loss(run) for run in runs if run.entrant == name and ended(run)}
        while (beyond := rate_beyond(losses, rates, MOST_BEYOND)) is not None:
            runs.append(plan.tuning(name, beyond))
            if not ended(runs[-1]):
                break
            losses[beyond] = _loss(runs[-1])
    return runs


def best_rates(plan: Plan, tuning: Sequence[LadderRun]) -> dict[str, float]:
    """Return each architecture's multiple with the lowest final loss; the first of ``rates=`` where none is known."""
    found: dict[str, tuple[float, float]] = {}
    for run in tuning:
        if ended(run) == "completed":
            tried = (_loss(run), run.rate)
            found[run.entrant] = min(found.get(run.entrant, tried), tried)
    return {name: found[name][1] if name in found else plan.config.rates[0] for name in plan.archs}


def at_an_end(tuning: Sequence[LadderRun], rates: dict[str, float]) -> list[str]:
    """Return the architectures whose best multiple is the lowest or the highest that was tried."""
    found = []
    for name, best in rates.items():
        tried = [run.rate for run in tuning if run.entrant == name]
        if tried and best in (min(tried), max(tried)):
            found.append(name)
    return found


def _loss(run: LadderRun) -> float:
    """Return the final validation loss of a run that has ended; infinite for one that failed."""
    return read_evals(run.folder)[-1].valid_loss if ended(run) == "completed" else math.inf
