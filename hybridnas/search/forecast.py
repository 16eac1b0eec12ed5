"""What a search will come to within its minutes, from a measured speed: its baselines' time, and its candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.study.objectives import violation
from hybridnas.study.records import COMPLETE
from hybridnas.units import duration, several

if TYPE_CHECKING:
    from hybridnas.search.config import Budget

_EVAL_COST = 1 / 3  # of a token that is evaluated, beside one that is trained: a forward pass alone
_SAMPLE_SECONDS = 1.0  # of training the first baseline, to know the machine's speed


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Seconds and counts, from a speed that was measured here."""

    speed: float  # training tokens per second
    baselines: int  # that are trained
    outside: int  # that are not, because they pass a counted limit
    baseline_seconds: float  # of all of them
    candidates: int
    candidate_seconds: float  # of one, what is paused early included, over the processes that train side by side
    confirm_seconds: float = 0.0  # of the trainings after the search; 0: none are asked for

    def __str__(self) -> str:
        outside = f" ({self.outside} more are outside the limits and not trained)" if self.outside else ""
        confirmed = f", then confirmation in about {duration(self.confirm_seconds)}" if self.confirm_seconds else ""
        return (
            f"plan: {several(self.baselines, 'baseline')} in about {duration(self.baseline_seconds)}{outside}, "
            f"then about {several(self.candidates, 'candidate')} in "
            f"{duration(self.candidates * self.candidate_seconds)}{confirmed}, at {self.speed:,.0f} tokens/s"
        )


def forecast(plan: Plan, budget: Budget, history: History, *, workers: int = 1, confirmers: int = 1) -> Forecast | None:
    """Return what is to be expected; None where nothing says how fast this machine trains.

    ``workers``: processes that share the trials, ``confirmers``: the trainings of the confirmation.
    """
    speed = _speed(plan, budget, history, workers)
    if speed is None:
        return None
    tried = {record.preset for record in history.values()}
    presets = [plan.candidates.preset(name) for name in plan.presets if name not in tried]
    outside = [
        one
        for one in presets
        if plan.train_baselines != "all"
        and one.arch is not None
        and violation(plan.candidates.limits, plan.candidates.values(one))
    ]
    points = len(set(budget.eval_tokens(plan.rungs[-1] // max(1, round(budget.tokens_per_active_param)))))
    evaluated = points * budget.valid_tokens * _EVAL_COST
    whole = (plan.rungs[-1] + evaluated) / speed
    part = _mean_tokens(plan) / plan.rungs[-1]
    trained = len(presets) - len(outside)
    first = trained * whole / max(1, min(workers, trained))
    left = None if plan.minutes is None else max(0.0, 60 * plan.minutes - first)
    wanted = max(0, plan.n_trials - history.finished - trained)
    most = wanted if left is None else min(wanted, int(left * workers / (whole * part)))
    again = _confirmations(budget, trained) * whole / confirmers if budget.confirm == "on" else 0.0
    return Forecast(
        speed=speed,
        baselines=trained,
        outside=len(outside),
        baseline_seconds=first,
        candidates=most,
        candidate_seconds=whole * part / workers,
        confirm_seconds=again,
    )


def _confirmations(budget: Budget, baselines: int) -> int:
    """Return how many whole trainings a confirmation has, where three architectures meet in the verdict."""
    rates = 2 if budget.confirm_rates == "own" else 0  # beside the one that the search trained at
    again = min(baselines, budget.confirm_top + 1) + budget.confirm_top  # the reference may be one of the best
    return budget.screened + again * (rates + budget.confirm_seeds) + 3 * budget.verdict_seeds


def _mean_tokens(plan: Plan) -> float:
    """Return the tokens that a candidate trains on average, where one in ``reduction`` goes on from rung to rung."""
    if plan.pruner == "none":
        return float(plan.rungs[-1])
    before: Sequence[int] = (0, *plan.rungs[:-1])
    legs = enumerate(zip(before, plan.rungs, strict=True))
    return float(sum((end - begin) / plan.reduction**rung for rung, (begin, end) in legs))


def _speed(plan: Plan, budget: Budget, history: History, workers: int) -> float | None:
    known = sorted(
        record.tokens_per_second for record in history.values() if record.state == COMPLETE and record.tokens_per_second
    )
    if known:
        return known[len(known) // 2]
    first = next((arch for name in plan.presets if (arch := plan.candidates.preset(name).arch) is not None), None)
    if first is None:
        return None
    import torch

    from hybridnas.arch.model import HybridLM
    from hybridnas.search.latency import Setting, speeds
    from hybridnas.search.workers.supervisor import threads_each

    setting = Setting(
        figures=("train_tokens_per_second",),
        length=budget.seq_len,
        prefill_batch=1,
        decode_batch=1,
        train_batch=budget.batch_size,
        train_length=budget.seq_len,
        device="cpu",
        seconds=_SAMPLE_SECONDS,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_each(workers))
    try:
        return speeds(HybridLM(first, seed=0), setting)["train_tokens_per_second"].value
    finally:
        torch.set_num_threads(threads)
