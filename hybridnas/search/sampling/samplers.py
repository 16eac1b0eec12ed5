"""Samplers and pruners by name, as Optuna objects."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

from hybridnas.errors import ConfigError, suggest
from hybridnas.search.config import SAMPLERS
from hybridnas.search_spaces.space import Scale, Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

    from hybridnas.search.sampling.distinct import Naming

GENERATION = 16  # candidates of a generation of nsga2 [count]


def make_sampler(name: str, seed: int, space: Space, scale: Scale, naming: Naming | None = None) -> BaseSampler:
    """Return the sampler of that name for a space; none of them draws an architecture that the study has already.

    ``tpe``: multivariate, grouped by what exists together. ``evolution``: ours, ageing. ``nsga2``, ``gp``: Optuna's.
    ``random`` and ``bruteforce``, whose every choice is enqueued, so that nothing is left to draw.
    Raises ConfigError for an unknown name, or a package that is missing.
    """
    from hybridnas.search.sampling.distinct import Fresh, Naming

    return Fresh(_inner(name, seed, space, scale), naming or Naming(space, scale), seed)


def _inner(name: str, seed: int, space: Space, scale: Scale) -> BaseSampler:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group and gp are marked so
        if name == "tpe":
            return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
        if name == "evolution":
            from hybridnas.search.sampling.evolution import Evolution

            return Evolution(space, scale, seed)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=GENERATION, seed=seed)
        if name == "gp":
            if find_spec("scipy") is None:
                raise ConfigError("search sampler='gp' needs scipy: pip install scipy, or choose sampler=tpe")
            return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        # Optuna's own BruteForceSampler counts the baselines, which have no choices, as the whole tree and stops.
        if name in ("random", "bruteforce"):
            return optuna.samplers.RandomSampler(seed=seed)
    raise ConfigError(f"search sampler={name!r} is unknown{suggest(name, SAMPLERS)}")


def make_pruner(name: str, rung_tokens: tuple[int, ...]) -> BasePruner:
    """Return Hyperband over the rungs' token counts, or Optuna's pruner that stops nobody: halving is ours."""
    import optuna

    if name != "hyperband" or len(rung_tokens) == 1:
        return optuna.pruners.NopPruner()
    return optuna.pruners.HyperbandPruner(
        min_resource=rung_tokens[0], max_resource=rung_tokens[-1], reduction_factor=rung_tokens[1] // rung_tokens[0]
    )
