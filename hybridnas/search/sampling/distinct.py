"""Whole candidates at once, none twice: what stands between Optuna's samplers and a space.

Optuna samples parameter by parameter and knows nothing of architectures: samplers come back to what they like, and two
spellings of one architecture are two points to it. Here a candidate is drawn to its end, named by its architecture, and
drawn again while a trial of the study, finished or running, has that architecture already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hybridnas.errors import HybridNASError
from hybridnas.search_spaces.space import Scale, Space

DRAWN = "hybridnas:drawn"  # system attribute: the architecture, before the trial that was asked for says it
REDRAWS = 8  # by the sampler itself; a sampler that has settled on one point gives that one again and again
RANDOM_REDRAWS = 48  # then evenly from the space; where these are all known, too, the space is as good as exhausted

Params = Mapping[str, Any]


class Fixed:
    """A chooser whose choices were made before; raises KeyError for one that was not."""

    def __init__(self, choices: Params) -> None:
        self.choices = choices

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.choices[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return float(self.choices[name])


class _Asking:
    """A chooser that asks for each choice and remembers what it was told, and from what."""

    def __init__(self, ask: Callable[[str, BaseDistribution], Any]) -> None:
        self.ask = ask
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._take(name, CategoricalDistribution(choices))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        return float(self._take(name, FloatDistribution(low, high, step=step)))

    def _take(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self.params:
            self.params[name] = self.ask(name, distribution)
            self.distributions[name] = distribution
        return self.params[name]


class Naming:
    """Names candidates by their architecture; remembers, because matching costs milliseconds."""

    def __init__(self, space: Space, scale: Scale) -> None:
        self.space, self.scale = space, scale
        self._names: dict[str, str] = {}

    def __call__(self, params: Params) -> str:
        """Return the fingerprint of what ``params`` lead to; of an infeasible candidate, its choices."""
        key = json.dumps(dict(params), sort_keys=True)
        if key not in self._names:
            try:
                self._names[key] = self.space.propose(Fixed(params), self.scale).arch.fingerprint()
            except HybridNASError:
                self._names[key] = f"infeasible {key}"
        return self._names[key]

    def walk(self, ask: Callable[[str, BaseDistribution], Any]) -> _Asking:
        """Return all choices on one way through the space, each asked for."""
        asking = _Asking(ask)
        self.space.choose(asking, self.scale)
        return asking


def ask(study: Study) -> Trial:
    """Return the study's next trial with its candidate drawn already, so that other workers can know it.

    Optuna alone waits until the first choice is asked for.
    """
    trial = study.ask()
    _ = trial.relative_params
    return trial


class Fresh(BaseSampler):
    """Lets ``inner`` draw from a space, and lets it draw again what the study has already."""

    def __init__(self, inner: BaseSampler, naming: Naming, seed: int) -> None:
        self.inner, self.naming = inner, naming
        self.redrawn = 0  # draws that were thrown away
        self._uniform = RandomSampler(seed=seed)
        self._ready: dict[int, _Asking] = {}  # what was drawn for a trial that is being made

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()
        self._uniform.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Draw the whole candidate here: only then is it known which choices it has."""
        if trial.system_attrs.get("fixed_params") is not None:  # a baseline, or a choice that is repeated
            return {}
        drawn = self._draw(study, trial)
        self._ready = {trial.number: drawn}
        study._storage.set_trial_system_attr(trial._trial_id, DRAWN, self.naming(drawn.params))
        return drawn.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        ready = self._ready.pop(trial.number, None)
        return ready.params if ready is not None else {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)

    def _draw(self, study: Study, trial: FrozenTrial) -> _Asking:
        known = _known(study, trial)
        joint = self.inner.infer_relative_search_space(study, trial)
        drawn = self._ask(self.inner, study, trial, joint)
        for attempt in range(REDRAWS + RANDOM_REDRAWS):
            if self.naming(drawn.params) not in known:
                return drawn
            self.redrawn += 1
            drawn = self._ask(self.inner if attempt < REDRAWS else self._uniform, study, trial, joint)
        return drawn

    def _ask(
        self, sampler: BaseSampler, study: Study, trial: FrozenTrial, joint: dict[str, BaseDistribution]
    ) -> _Asking:
        together = sampler.sample_relative(study, trial, joint) if sampler is self.inner else {}

        def ask(name: str, distribution: BaseDistribution) -> Any:
            if name in together and distribution._contains(distribution.to_internal_repr(together[name])):
                return together[name]
            return sampler.sample_independent(study, trial, name, distribution)

        return self.naming.walk(ask)


def _known(study: Study, trial: FrozenTrial) -> set[str]:
    """Return the architectures that the study has tried or is trying."""
    found = set()
    for other in all_trials(study):
        if other.number != trial.number:
            found.add(other.user_attrs.get("fingerprint") or other.system_attrs.get(DRAWN, ""))
    return found


def all_trials(study: Study) -> list[FrozenTrial]:
    """Return every trial of a study; under Hyperband a sampler's study shows those of one bracket alone."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False)
