"""Samplers by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.errors import ConfigError, suggest
from hybridnas.search.config import SAMPLERS

if TYPE_CHECKING:
    from hybridnas.search.plan import Plan
    from hybridnas.search.sampling.candidates import Sampler


def make_sampler(plan: Plan) -> Sampler:
    """Return the sampler that the plan names; none of them draws an architecture again while the space has others.

    ``tpe``: multivariate, grouped by what exists together. ``evolution``: ours, ageing. ``nsga2``, ``gp``: Optuna's.
    ``random`` draws evenly, ``bruteforce`` tries everything once, in order.
    Raises ConfigError for an unknown name, several objectives with evolution, or a package that is missing.
    """
    name, candidates, seed = plan.sampler, plan.candidates, plan.seed
    if name not in SAMPLERS:
        raise ConfigError(
            f"search sampler={name!r} is unknown{suggest(name, SAMPLERS)}", field="sampler", got=name, allowed=SAMPLERS
        )
    if name == "evolution":
        if len(plan.objectives) > 1:
            raise ConfigError(
                "search sampler=evolution looks for one objective; with several take nsga2 or tpe",
                field="sampler",
                got=name,
                allowed=("nsga2", "tpe"),
            )
        from hybridnas.search.sampling.evolution import Evolution

        return Evolution(candidates, seed)
    if name in ("random", "bruteforce"):
        from hybridnas.search.sampling.uniform import BruteForce, Uniform

        return Uniform(candidates, seed) if name == "random" else BruteForce(candidates)
    from hybridnas.search.sampling.optuna_samplers import OptunaSampler
    from hybridnas.search.sampling.optuna_view import hyperband

    return OptunaSampler(name, plan.view, seed, hyperband(plan.rungs) if plan.pruner == "hyperband" else None)
