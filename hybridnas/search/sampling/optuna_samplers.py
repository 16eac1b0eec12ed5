"""Optuna's samplers (tpe, nsga2, gp) over whole candidates: asked on a study in memory that the records make."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hybridnas.errors import ConfigError
from hybridnas.search.history import History
from hybridnas.search.sampling.candidates import Candidates, Draw, Drawn, Parameter, first_new
from hybridnas.search.sampling.optuna_view import OptunaView, distribution, quiet
from hybridnas.search.sampling.uniform import draw_generator, evenly

GENERATION = 16  # candidates of a generation of nsga2 [count]


class OptunaSampler:
    """One of Optuna's samplers, seeded anew for every draw, so that a draw depends on the records alone."""

    def __init__(self, name: str, view: OptunaView, seed: int, pruner: BasePruner | None = None) -> None:
        if name == "gp" and find_spec("scipy") is None:
            raise ConfigError(
                "search sampler='gp' needs scipy: pip install scipy, or choose sampler=tpe",
                field="sampler",
                got="gp",
                allowed="tpe",
            )
        self.name, self.view, self.seed, self.pruner = name, view, seed, pruner

    def draw(self, history: History, number: int) -> Draw | None:
        with quiet():
            return self._draw(history, number)

    def _draw(self, history: History, number: int) -> Draw | None:
        whole = _Whole(
            _inner(self.name, draw_seed(self.seed, number)), self.view.candidates, history, self.seed, number
        )
        study = self.view.study(history.ordered(), sampler=whole, pruner=self.pruner, below=number)
        trial = study.ask()
        _ = trial.relative_params  # draws where Optuna has not yet done so
        marks = study.get_trials(deepcopy=False)[number].system_attrs
        if whole.drawn is None:
            return None
        kept = {key: value for key, value in marks.items() if "relative_params" not in key}
        return dataclasses.replace(whole.drawn, marks=kept)


def draw_seed(seed: int, number: int) -> int:
    """Return the seed of one draw [0 to 2**32)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def _inner(name: str, seed: int) -> BaseSampler:
    if name == "tpe":
        return TPESampler(multivariate=True, group=True, seed=seed)
    if name == "nsga2":
        return NSGAIISampler(population_size=GENERATION, seed=seed)
    return GPSampler(seed=seed, warn_independent_sampling=False)


class _Whole(BaseSampler):
    """Draws a whole candidate where Optuna asks for the first time: only then is it known which choices it has."""

    def __init__(self, inner: BaseSampler, candidates: Candidates, history: History, seed: int, number: int) -> None:
        self.inner, self.candidates, self.history = inner, candidates, history
        self.chance = draw_generator(seed, number)
        self.drawn: Draw | None = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        joint = self.inner.infer_relative_search_space(study, trial)

        def own() -> Drawn:
            together = self.inner.sample_relative(study, trial, joint)
            return self.candidates.walk(lambda name, one: self._choice(study, trial, together, name, one))

        def uniform() -> Drawn:
            return evenly(self.candidates, self.chance)

        self.drawn = first_new(self.candidates, self.history.known(), own, uniform)
        return {}

    def _choice(
        self, study: Study, trial: FrozenTrial, together: Mapping[str, Any], name: str, parameter: Parameter
    ) -> Any:
        if name in together and parameter.allows(together[name]):
            return together[name]
        return self.inner.sample_independent(study, trial, name, distribution(parameter))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)
