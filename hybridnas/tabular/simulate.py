"""A search on known scores, in memory: the loop of a study with a table in place of training, in milliseconds a search.

Presets are left out: they would give every sampler the same beginning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.arch.arch import Arch
from hybridnas.search.history import History
from hybridnas.search.loop import Listener, Loop
from hybridnas.search.plan import Plan
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.storage.store import MemoryStore
from hybridnas.search.table import LookupTrainer, looked_up
from hybridnas.study.callbacks import COMPLETED
from hybridnas.study.records import COMPLETE, TrialRecord
from hybridnas.train.callbacks import Action
from hybridnas.train.records import Eval, TrainResult

if TYPE_CHECKING:
    from hybridnas.search.latency import Figure

Scores = Mapping[str, Mapping[int, float]]  # fingerprint -> training tokens -> loss; what diverged has no last score


@dataclass
class Course:
    """What one search found when: each full score with the trials begun and the tokens trained until then."""

    sampler: str
    pruner: str
    seed: int
    found: list[tuple[int, int, float]] = field(default_factory=list)  # trials, tokens, full score
    trials: int = 0
    tokens: int = 0
    redrawn: int = 0  # draws that the sampler was asked to make again
    records: list[TrialRecord] = field(default_factory=list, repr=False, compare=False)  # in the order of their ends

    def tokens_to(self, score: float) -> float:
        """Return the training tokens until a full score of at most ``score``; infinite where there was none."""
        return next((tokens for _, tokens, value in self.found if value <= score), math.inf)

    def best_at(self, *, tokens: float = math.inf, trials: float = math.inf) -> float:
        """Return the best full score by then; infinite where there was none."""
        reached = [value for begun, spent, value in self.found if begun <= trials and spent <= tokens]
        return min(reached, default=math.inf)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a search ends without the best: after ``most`` tokens, or ``enough`` with a score of ``target``."""

    most: float
    enough: float = math.inf
    target: float = -math.inf

    def end(self, tokens: int, best: float) -> bool:
        """Whether a search ends that has trained so many tokens and found this score."""
        return tokens >= self.most or (tokens >= self.enough and best <= self.target)


def simulate(
    scores: Scores,
    candidates: Candidates,
    sampler: str,
    pruner: str,
    *,
    rungs: Sequence[int],
    reduction: int,
    seed: int,
    limits: Limits,
) -> Course:
    """Search until the best of ``scores`` is found, a limit is met or all are tried; a seed gives one course."""
    plan = Plan(
        candidates=candidates.only(scores),
        rungs=tuple(rungs),
        reduction=reduction,
        n_trials=len(scores),
        max_draws=10**6,  # what has no score costs nothing here
        seed=seed,
        sampler=sampler,
        pruner=pruner,
    )
    goal = min((curve.get(plan.rungs[-1], math.inf) for curve in scores.values()), default=math.inf)
    course = Course(sampler, pruner, seed)

    def stop(history: History) -> str | None:
        best = course.best_at()
        return COMPLETED if best <= goal or limits.end(history.trained_tokens, best) else None

    loop = Loop(plan, MemoryStore(), _Scores(scores, plan.rungs), _Recorder(course), stop=stop, give_up=False)
    loop.run()
    course.trials, course.tokens = loop.history.finished, loop.history.trained_tokens
    course.redrawn = loop.redrawn
    return course


class _Recorder(Listener):
    def __init__(self, course: Course) -> None:
        self.course = course

    def ended(self, record: TrialRecord, history: History) -> None:
        self.course.records.append(record)
        if record.state == COMPLETE and record.valid_loss is not None:
            self.course.found.append((history.finished, history.trained_tokens, record.valid_loss))


class _Scores(LookupTrainer):
    """A trainer that looks losses up."""

    def __init__(self, scores: Scores, rungs: Sequence[int]) -> None:
        self.scores, self.rungs = scores, tuple(rungs)

    def figures(self, arch: Arch) -> Mapping[str, Figure]:
        return {}

    def train(self, record: TrialRecord, arch: Arch, on_eval: Callable[[Eval], Action]) -> TrainResult:
        evals, failed = self._curve(record.fingerprint)
        return looked_up(evals, self.rungs, on_eval, failed=failed, folder=Path())

    def _curve(self, fingerprint: str) -> tuple[list[Eval], str]:
        curve = self.scores[fingerprint]
        evals: list[Eval] = []
        for rung in self.rungs:
            loss = curve.get(rung, math.inf)
            if not math.isfinite(loss):
                return evals, f"no score at {rung:,} tokens"
            evals.append(Eval(rung, 0, math.nan, loss, None, math.nan, 0.0, 0.0))
        return evals, ""
