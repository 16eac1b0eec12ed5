"""What a search decides by: plain values, the same in a search that trains and in one that is simulated."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybridnas.search.pruning.promotion import Promotion
from hybridnas.search.sampling.candidates import Candidates, Sampler

if TYPE_CHECKING:
    from hybridnas.search.sampling.optuna_view import OptunaView


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A search without its data and its folder."""

    candidates: Candidates
    rungs: tuple[int, ...]  # training tokens, rising; the last one is a whole trial
    reduction: int  # one in so many goes on from a rung to the next
    n_trials: int  # the search ends with this many finished trials
    seed: int = 0
    sampler: str = "evolution"
    pruner: str = "halving"
    objectives: tuple[str, ...] = ("val_loss",)
    limits: Mapping[str, float] = field(default_factory=dict)  # of a candidate: max_params, ...
    state_length: int | None = None  # context at which state_bytes counts [tokens]; None: that of the scale
    rate: str = "shared"  # or tuned: every candidate races for its own learning rate
    lr: float = 0.0  # the budget's learning rate, where races start
    hardware: bool = False  # whether candidates are measured on this machine
    presets: tuple[str, ...] = ()  # trained first
    train_baselines: str = "within"  # those that keep the limits; or all
    minutes: float | None = None  # no trial starts that would end later
    max_draws: int | None = None  # candidates in all, trained or not; None: some for each trial
    max_tokens: int | None = None  # no new candidate once so many were trained in all

    @functools.cached_property
    def promotion(self) -> Promotion:
        """Which candidate goes on past which rung, where the pruner is halving."""
        return Promotion(self.rungs, self.reduction, self.n_trials)

    @functools.cached_property
    def view(self) -> OptunaView:
        """What Optuna's samplers and pruners see of the records."""
        from hybridnas.search.sampling.optuna_view import OptunaView

        return OptunaView(self.candidates, self.objectives, self.limits, self.rungs)

    @functools.cached_property
    def draws(self) -> Sampler:
        """What draws the next candidate. Raises ConfigError where it cannot do what was asked for."""
        from hybridnas.search.sampling.samplers import make_sampler

        return make_sampler(self)
