"""Samplers and pruners by name, as Optuna objects."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Return the sampler: ``tpe`` (multivariate, grouped by what exists together), ``random`` or ``bruteforce``."""
    import optuna

    if name == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group is marked experimental
            return optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)
    # Brute force enqueues every combination in order, so nothing is left to draw. Optuna's own BruteForceSampler counts
    # the baselines, which have no choices, as the whole tree and stops.
    if name in ("random", "bruteforce"):
        return optuna.samplers.RandomSampler(seed=seed)
    raise ConfigError(f"search sampler={name!r} must be one of tpe, random, bruteforce")


def make_pruner(name: str, rung_tokens: tuple[int, ...], reduction: int) -> BasePruner:
    """Return the pruner: Hyperband over the rungs' token counts, or none."""
    import optuna

    if name == "none" or len(rung_tokens) == 1:
        return optuna.pruners.NopPruner()
    return optuna.pruners.HyperbandPruner(
        min_resource=rung_tokens[0], max_resource=rung_tokens[-1], reduction_factor=reduction
    )
