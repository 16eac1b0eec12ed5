"""A search on known scores, in memory: the same sampler, pruner and promotions as a study, without training or files.

What the runner does in seconds a trial is done here in milliseconds, so that hundreds of searches can be compared.
Baselines are left out: they would give every sampler the same beginning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import optuna
from optuna.trial import Trial, TrialState

from hybridnas.search.pruning import halving
from hybridnas.search.sampling.distinct import Naming
from hybridnas.search.sampling.samplers import make_pruner, make_sampler

Scores = Mapping[str, Mapping[int, float]]  # fingerprint -> training tokens -> loss; what diverged has no last score
IDLE = 400  # so many draws in a row without anything to train end a search: the space is exhausted


@dataclass(frozen=True)
class Ladder:
    """Rungs in training tokens, the last one the full run, and how many of a rung go on: one in ``reduction``."""

    rungs: tuple[int, ...]
    reduction: int


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
        return tokens >= self.most or (tokens >= self.enough and best <= self.target)


def simulate(
    scores: Scores, naming: Naming, ladder: Ladder, sampler: str, pruner: str, *, seed: int, limits: Limits
) -> Course:
    """Search until the best of ``scores`` is found or a limit is met; the same seed is the same search."""
    return _Simulation(scores, naming, ladder, Course(sampler, pruner, seed), limits).run()


class _Simulation:
    def __init__(self, scores: Scores, naming: Naming, ladder: Ladder, course: Course, limits: Limits) -> None:
        self.scores, self.naming, self.ladder, self.course, self.limits = scores, naming, ladder, course, limits
        self.top = ladder.rungs[-1]
        self.goal = min((curve.get(self.top, math.inf) for curve in scores.values()), default=math.inf)
        self.rungs: dict[int, dict[int, float]] = {rung: {} for rung in ladder.rungs}
        self.names: dict[int, str] = {}  # candidate -> fingerprint
        self.tried: dict[str, int] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(
            sampler=make_sampler(course.sampler, course.seed, naming.space, naming.scale, naming),
            pruner=make_pruner(course.pruner, ladder.rungs),
            study_name=f"{course.sampler}-{course.seed}",  # Hyperband's bracket of a trial depends on it
        )

    def run(self) -> Course:
        course, idle = self.course, 0
        while idle < IDLE and (best := course.best_at()) > self.goal and not self.limits.end(course.tokens, best):
            number = halving.next_promotion(self.rungs, self.ladder.reduction) if course.pruner == "halving" else None
            if number is not None:
                self._promote(number)
                continue
            if len(self.tried) == len(self.scores):
                break
            trial = self.study.ask()
            self.naming.space.choose(trial, self.naming.scale)
            name = self.naming(trial.params)
            trial.set_user_attr("fingerprint", name)
            idle += 1
            if name in self.tried:
                self._again(trial, self.tried[name])
            elif name not in self.scores:
                self.study.tell(trial, state=TrialState.PRUNED)  # infeasible, as a study records it
            else:
                idle = 0
                self.tried[name] = trial.number
                self.names[trial.number] = name
                course.trials += 1
                self._train(trial, trial.number, 0)
        course.redrawn = getattr(self.study.sampler, "redrawn", 0)
        return course

    def _train(self, trial: Trial, number: int, had: int) -> None:
        """Go on with a candidate that has had ``had`` tokens until it is done, stopped or paused."""
        curve = self.scores[self.names[number]]
        for rung in self.ladder.rungs:
            loss = curve.get(rung, math.inf)
            if not math.isfinite(loss):
                self.course.tokens += max(0, rung - had)
                self.study.tell(trial, state=TrialState.FAIL)
                return
            trial.report(loss, rung)
            if rung <= had:
                continue
            self.course.tokens += rung - had
            had = rung
            self.rungs[rung][number] = loss
            if rung == self.top:
                self.course.found.append((self.course.trials, self.course.tokens, loss))
                self.study.tell(trial, loss)
            elif self._ends(trial, rung, number):
                self.study.tell(trial, state=TrialState.PRUNED)
                return

    def _ends(self, trial: Trial, rung: int, number: int) -> bool:
        if self.course.pruner == "halving":
            return not halving.goes_on(self.rungs, self.ladder.reduction, rung, number)
        return trial.should_prune()

    def _promote(self, number: int) -> None:
        """Take up a paused candidate: another trial of Optuna, as in a study."""
        had = max(rung for rung, reached in self.rungs.items() if number in reached)
        params = self.study.get_trials(deepcopy=False)[number].params
        self.study.enqueue_trial(params, user_attrs={"continues": number, "fingerprint": self.names[number]})
        trial = self.study.ask()
        self.naming.space.choose(trial, self.naming.scale)
        self._train(trial, number, had)

    def _again(self, trial: Trial, number: int) -> None:
        """Tell an architecture that was tried before once more, at no cost, as a study does."""
        reached = [rung for rung in self.ladder.rungs if number in self.rungs[rung]]
        trial.set_user_attr("duplicate_of", number)
        for rung in reached:
            trial.report(self.rungs[rung][number], rung)
        if reached and reached[-1] == self.top:
            self.study.tell(trial, self.rungs[self.top][number])
        else:
            self.study.tell(trial, state=TrialState.PRUNED)
