"""Make the sampler that a setting names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridnas.search.config import check_sampler

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
    check_sampler(name, plan.objectives)
    if name == "evolution":
        from hybridnas.search.sampling.evolution import Evolution

        return Evolution(candidates, seed)
    if name in ("random", "bruteforce"):
        from hybridnas.search.sampling.uniform import BruteForce, Uniform

        return Uniform(candidates, seed) if name == "random" else BruteForce(candidates)
    from hybridnas.search.sampling.optuna_samplers import OptunaSampler
    from hybridnas.search.sampling.optuna_view import hyperband

    return OptunaSampler(name, plan.view, seed, hyperband(plan.rungs) if plan.pruner == "hyperband" else None)
