"""How often a cheap comparison of architectures decides as a large, tuned one does.

The truth is a score for each architecture at the largest size of a truth set (:mod:`hybridnas.study.truth`): its own
best rate, mean over seeds, on the test part. A policy is a way to score the same architectures for less. Of every pair
of architectures it decides rightly when it orders them as the truth does (DataDecide, arXiv 2504.11393). Losses are in
nats per token, costs in FLOPs of training; intervals are 95 % percentiles of a bootstrap over architectures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.errors import StudyError
from hybridnas.study.truth import RATES, RUNGS, TEXT, TruthRow

ANNEALED, TRUNK, COSINE = "annealed", "trunk", "cosine"
SPEED, EXTRAPOLATED = "training speed", "extrapolated"
SETTABLE = (ANNEALED, COSINE)  # signals that a budget can be set to: budget.schedule
OWN, HALVED = "own", "halved"  # rate policies beside one shared rate
LEAST = 6  # architectures; fewer say nothing about an order
LIKE = 1.6  # factor in size and in tokens within which a budget is the one that was measured
ENOUGH = 16  # architectures with all rates that make a size the truth
_DRAWS = 1000
_TRAINING = 3.0  # FLOPs of a training step over those of its forward pass
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A way to score an architecture: what is read, at which size, rate and share of the training."""

    signal: str  # annealed | trunk (constant rate, no decay) | cosine | training speed | extrapolated
    size: int  # active parameters [count per token]
    rate: str  # own: best of the grid; halved: the best of the grid at the rung before goes on; or one rate for all
    rung: float  # share of a whole training of 100 tokens per active parameter [0 to 1]
    seeds: int = 1
    # Of two stages where it is not 0: a finished model of one seed at this rung chooses the better half, and only that
    # is trained to ``rung``, anew, with ``seeds`` further seeds; the others rank behind, as the first stage has them.
    first: float = 0.0

    @property
    def used(self) -> int:
        """How many seeds of an architecture it looks at, the first of them."""
        return self.seeds + (1 if self.first else 0)


@dataclass(frozen=True)
class Truth:
    """What is taken as right: a score of each architecture, and what finding it cost."""

    size: int
    scores: Mapping[str, float]  # pattern -> test loss at the best rate, mean over seeds
    halves: Mapping[str, str]  # pattern -> choosing | reporting
    costs: Mapping[str, float]  # pattern -> FLOPs of all its trainings
    seeds: Mapping[str, int]


@dataclass(frozen=True)
class Quality:
    """How well one order agrees with the truth; each of the last three with its 95 % interval."""

    n: int  # architectures
    accuracy: float  # share of pairs ordered as in the truth, a tie counts half
    accuracy_best_half: float | None  # of the pairs within the better half; none: fewer than two there
    regret: float  # truth of the one that is chosen, beyond that of the best [nats]
    spearman: float | None
    intervals: Mapping[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, each figure with its interval."""
        figures = {name: getattr(self, name) for name in ("accuracy", "accuracy_best_half", "regret", "spearman")}
        intervals = {f"{name}_interval": list(ends) for name, ends in self.intervals.items()}
        return {"n": self.n, **figures, **intervals}


class Rows:
    """The trainings of a truth set on text, found by what they are."""

    def __init__(self, rows: Iterable[TruthRow], grid: Sequence[float] = RATES) -> None:
        """``grid``: rates that every architecture is trained at. Raises StudyError for rows of different settings."""
        self.all = [row for row in rows if row.task == TEXT]
        self.grid = sorted(grid)  # rates beyond it are tried for some architectures alone
        self._found: dict[tuple[str, int, bool], dict[tuple[float, int], TruthRow]] = {}
        settings: dict[tuple[int, str], str] = {}
        for row in self.all:
            if settings.setdefault((row.size, row.schedule), row.settings) != row.settings:
                raise StudyError(
                    f"the truth set mixes trainings of {row.size:,} active parameters and schedule {row.schedule} of "
                    f"different settings ({settings[row.size, row.schedule]}, {row.settings}); keep those of one",
                    field="settings",
                    got=row.settings,
                    allowed=settings[row.size, row.schedule],
                )
            trainings = self._found.setdefault((row.pattern, row.size, row.schedule == COSINE), {})
            trainings[row.rate, row.seed] = row
        self.patterns = sorted({row.pattern for row in self.all})
        self.sizes = sorted({row.size for row in self.all})

    def at(self, pattern: str, size: int, *, cosine: bool = False) -> dict[tuple[float, int], TruthRow]:
        """Return (rate, seed) -> training."""
        return self._found.get((pattern, size, cosine), {})

    def truth(self) -> Truth:
        """Return the truth: the largest size at which ENOUGH architectures have all rates of the grid.

        Raises StudyError where there is none.
        """
        for size in reversed(self.sizes):
            found = self.truth_at(size)
            if len(found.scores) >= ENOUGH:
                return found
        raise StudyError(
            f"the truth set has no size with {ENOUGH} architectures at all rates yet ({len(self.all)} trainings); "
            f"python -m hybridnas.bench truth goes on with it",
            field="truth",
            got=len(self.all),
            allowed=f"{ENOUGH} architectures at all rates",
        )

    def truth_at(self, size: int, *, first_seed: int = 0) -> Truth:
        """Return the truth of one size, from the seeds from ``first_seed`` on, for the architectures that have it."""
        scores: dict[str, float] = {}
        halves: dict[str, str] = {}
        costs: dict[str, float] = {}
        seeds: dict[str, int] = {}
        for pattern in self.patterns:
            own = self.at_best_rate(pattern, size)
            runs = [row for seed, row in own.items() if seed >= first_seed and not row.failed]
            if runs:
                firsts = [row for (_, seed), row in self.at(pattern, size).items() if seed == 0]
                scores[pattern] = fmean(row.loss if row.test_loss is None else row.test_loss for row in runs)
                halves[pattern] = runs[0].half
                costs[pattern] = sum(training_flops(row) for row in (*firsts, *(row for row in runs if row.seed > 0)))
                seeds[pattern] = len(runs)
        return Truth(size, scores, halves, costs, seeds)

    def at_best_rate(self, pattern: str, size: int) -> dict[int, TruthRow]:
        """Return seed -> training at the rate that the first seed's validation chose; none before all are there."""
        trainings = self.at(pattern, size)
        firsts = {rate: row for (rate, seed), row in trainings.items() if seed == 0}
        if not set(self.grid) <= set(firsts):
            return {}
        best = min(firsts, key=lambda rate: (firsts[rate].loss, rate))
        return {seed: row for (rate, seed), row in trainings.items() if rate == best}

    def scores(self, policy: Policy, patterns: Iterable[str]) -> dict[str, tuple[float, float]]:
        """Return pattern -> score under a policy and its cost [FLOPs], for the architectures that have the trainings.

        Scores of a policy of two stages are places in its order, the best 0.
        """
        if not policy.first:
            return {pattern: found for pattern in patterns if (found := self._score(policy, pattern)) is not None}
        first = Policy(signal=policy.signal, size=policy.size, rate=policy.rate, rung=policy.first)
        known = self.scores(first, patterns)
        ranked = sorted(known, key=lambda pattern: (known[pattern], pattern))
        half = math.ceil(len(ranked) / 2)
        again = {pattern: self._fresh(policy, pattern) for pattern in ranked[:half]}
        finalists = {pattern: found for pattern, found in again.items() if found is not None}
        order = [*sorted(finalists, key=lambda pattern: (finalists[pattern], pattern)), *ranked[half:]]
        costs = {pattern: known[pattern][1] + finalists.get(pattern, (0.0, 0.0))[1] for pattern in order}
        return {pattern: (float(place), costs[pattern]) for place, pattern in enumerate(order)}

    def _fresh(self, policy: Policy, pattern: str) -> tuple[float, float] | None:
        """Return the mean score of the second stage's seeds at the policy's one rate, and their cost."""
        trainings = self.at(pattern, policy.size)
        wanted = range(1, policy.used)
        runs = [_read(trainings.get((float(policy.rate), seed)), policy.signal, policy.rung) for seed in wanted]
        found = [run for run in runs if run is not None]
        if len(found) < policy.seeds:
            return None
        return fmean(score for score, _ in found), sum(cost for _, cost in found)

    def _score(self, policy: Policy, pattern: str) -> tuple[float, float] | None:
        trainings = self.at(pattern, policy.size, cosine=policy.signal == COSINE)
        rates = self.grid if policy.rate in (OWN, HALVED) else [float(policy.rate)]
        at = policy.rung if policy.rate != HALVED else _before(policy.rung)
        if at is None:
            return None
        tried = {rate: _read(trainings.get((rate, 0)), policy.signal, at) for rate in rates}
        if any(value is None for value in tried.values()):
            return None
        known = {rate: value for rate, value in tried.items() if value is not None}
        rate = min(known, key=lambda one: (known[one][0], one))
        runs = [_read(trainings.get((rate, seed)), policy.signal, policy.rung) for seed in range(policy.seeds)]
        found = [run for run in runs if run is not None]
        if len(found) < policy.seeds:
            return None
        others = sum(cost for other, (_, cost) in known.items() if other != rate)
        if policy.rate == HALVED and policy.signal == ANNEALED:
            others += _branches(trainings[rate, 0], policy.rung, at)  # of the one that goes on
        return fmean(score for score, _ in found), others + sum(cost for _, cost in found)


def training_flops(row: TruthRow, share: float = 1.0) -> float:
    """Return the FLOPs of a share of a training, forward and backward."""
    return _TRAINING * row.flops_per_token * row.tokens * share


def _branches(row: TruthRow, rung: float, first: float = 0.0) -> float:
    """Return the FLOPs of the decays at the rungs from ``first`` to below ``rung``, which training came back from."""
    share = (row.trained_tokens / row.tokens - 1) / sum(RUNGS[:-1])
    return training_flops(row, share * sum(one for one in RUNGS if first <= one < rung))


def _before(rung: float) -> float | None:
    return max((other for other in RUNGS if other < rung), default=None)


def _read(row: TruthRow | None, signal: str, rung: float) -> tuple[float, float] | None:
    """Return what a training says at a rung, and what it cost until there; a diverged one is infinitely bad."""
    if row is None:
        return None
    if row.failed:
        return math.inf, training_flops(row, rung)
    if signal == TRUNK:
        share = max((tokens for tokens, _, _ in row.curve if tokens < rung * row.tokens), default=0) / row.tokens
        return (row.trunk[rung], training_flops(row, share)) if rung in row.trunk else None
    if signal == SPEED:
        return _training_speed(row, rung)
    if signal == EXTRAPOLATED:
        points = [row.losses[one] for one in RUNGS if one <= rung and one in row.losses]
        if len(points) < 3 or rung not in row.losses:
            return None
        return extrapolated(points[-3:]), training_flops(row, rung) + _branches(row, rung)
    return (row.losses[rung], training_flops(row, rung)) if rung in row.losses else None


def _training_speed(row: TruthRow, rung: float) -> tuple[float, float] | None:
    """Return the mean training loss up to a rung, the sum of Ru et al. (arXiv 2006.04492) over its length."""
    total, read = 0.0, 0
    for tokens, _, train_loss in row.curve:
        if tokens <= rung * row.tokens:
            total, read = total + train_loss * (tokens - read), tokens
    return (total / read, training_flops(row, read / row.tokens)) if read else None


def extrapolated(losses: Sequence[float]) -> float:
    """Return the loss at twice the tokens of the last of three, each at twice the tokens of the one before.

    Of a power law ``a + b t^-c`` the differences shrink by one factor at every doubling. Losses that rise, or fall ever
    faster, are no power law: the factor is kept between 0 and 1.
    """
    first, second = losses[0] - losses[1], losses[1] - losses[2]
    factor = min(max(second / first, 0.0), 1.0) if first > 0 else 0.0
    return losses[2] - second * factor


def policies(rows: Rows) -> Iterator[Policy]:
    """Yield every policy that a truth set can judge."""
    shared = [f"{rate:g}" for rate in rows.grid]
    for size in rows.sizes:
        for rung in RUNGS:
            for signal in (ANNEALED, TRUNK):
                for rate in (*shared, OWN, HALVED):
                    yield Policy(signal=signal, size=size, rate=rate, rung=rung)
            for seeds in (2, 3):
                for rate in (*shared, OWN):
                    yield Policy(signal=ANNEALED, size=size, rate=rate, rung=rung, seeds=seeds)
            for first in (one for one in RUNGS if one <= rung):
                for seeds in (1, 2, 3):
                    for rate in shared:
                        yield Policy(signal=ANNEALED, size=size, rate=rate, rung=rung, seeds=seeds, first=first)
            for rate in shared:
                yield Policy(signal=COSINE, size=size, rate=rate, rung=rung)
                yield Policy(signal=SPEED, size=size, rate=rate, rung=rung)
            for rate in (*shared, OWN):
                yield Policy(signal=EXTRAPOLATED, size=size, rate=rate, rung=rung)


def quality(scores: Sequence[float], truth: Sequence[float], *, draws: int = _DRAWS, seed: int = 0) -> Quality:
    """Return how well ``scores`` (less is better) orders architectures as ``truth`` does.

    The bootstrap draws architectures with replacement; a pair counts as often as both were drawn, an architecture and
    itself are no pair. Raises StudyError for fewer than two.
    """
    if len(scores) < 2:
        raise StudyError(f"decision accuracy needs two architectures or more, got {len(scores)}", field="scores")
    order = np.argsort(np.asarray(truth, dtype=np.float64), kind="stable")  # best first
    given, right = np.asarray(scores, dtype=np.float64)[order], np.asarray(truth, dtype=np.float64)[order]
    agrees = _agreement(given, right)
    ones = np.ones((1, len(right)))
    drawn = np.random.default_rng(seed).multinomial(len(right), [1 / len(right)] * len(right), size=draws)
    found: dict[str, float | None] = {}
    intervals: dict[str, tuple[float, float]] = {}
    measures: dict[str, Callable[[Floats], Floats]] = {
        "accuracy": lambda weights: _share(weights, agrees),
        "accuracy_best_half": lambda weights: _share(_best_half(weights), agrees),
        "regret": lambda weights: _regret(weights, given, right),
    }
    for name, measure in measures.items():
        value = float(measure(ones)[0])
        found[name] = value if math.isfinite(value) else None
        spread = measure(drawn.astype(np.float64))
        spread = spread[np.isfinite(spread)]
        if len(spread):
            low, high = np.percentile(spread, [2.5, 97.5])
            intervals[name] = (float(low), float(high))
    accuracy, regret = found["accuracy"], found["regret"]
    assert accuracy is not None and regret is not None
    return Quality(len(right), accuracy, found["accuracy_best_half"], regret, _spearman(given, right), intervals)


def _agreement(scores: Floats, truth: Floats) -> Floats:
    """Return for each pair 1 where both order it alike, 0 where not, 0.5 for a tie of the scores, NaN for no pair."""
    with np.errstate(invalid="ignore"):  # two that diverged
        said = np.nan_to_num(np.sign(scores[:, None] - scores[None, :]), nan=0.0)
    is_so = np.sign(truth[:, None] - truth[None, :])
    return np.where(is_so == 0, np.nan, 0.5 + 0.5 * said * is_so)


def _share(weights: Floats, agrees: Floats) -> Floats:
    """Return the weighted share of pairs decided rightly, one for each row of weights; NaN where there is no pair."""
    counted = ~np.isnan(agrees)
    total = np.einsum("bi,bj,ij->b", weights, weights, counted.astype(np.float64), optimize=True)
    right = np.einsum("bi,bj,ij->b", weights, weights, np.where(counted, agrees, 0.0), optimize=True)
    share: Floats = np.divide(right, total, out=np.full(len(weights), np.nan), where=total > 0)
    return share


def _best_half(weights: Floats) -> Floats:
    """Return the weights of the better half of what was drawn, architectures lying best first."""
    before = np.cumsum(weights, axis=1) - weights
    half = np.ceil(weights.sum(axis=1, keepdims=True) / 2)
    kept: Floats = np.clip(half - before, 0.0, weights)
    return kept


def _regret(weights: Floats, scores: Floats, truth: Floats) -> Floats:
    absent = weights <= 0
    chosen = np.argmin(np.where(absent, np.inf, scores), axis=1)
    regret: Floats = truth[chosen] - np.min(np.where(absent, np.inf, truth), axis=1)
    return regret


def _spearman(scores: Floats, truth: Floats) -> float | None:
    from scipy import stats

    if len(scores) < LEAST or len(set(scores)) < 2 or len(set(truth)) < 2:
        return None
    return float(stats.spearmanr(scores, truth).statistic)


@dataclass(frozen=True)
class Judged:
    """A policy, what it costs beside the truth, and how well it decides among some architectures."""

    policy: Policy
    compute_fraction: float
    quality: Quality
    shares_trainings: bool  # with the truth, since no further seeds are there: its accuracy is too high

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self.policy),
            "compute_fraction": self.compute_fraction,
            "shares_trainings": self.shares_trainings,
            **self.quality.to_dict(),
        }


def judge(rows: Rows, policy: Policy, truth: Truth, half: str | None = None, *, draws: int = _DRAWS) -> Judged | None:
    """Return how well a policy decides among the architectures of a half, none: of both; None for fewer than LEAST.

    A policy at the truth's own size is judged by further seeds than its own, where there are such.
    """
    shares = policy.size == truth.size and policy.signal != COSINE
    if shares:
        other = rows.truth_at(truth.size, first_seed=policy.used)
        if len(other.scores) >= len(truth.scores):
            truth, shares = Truth(truth.size, other.scores, other.halves, truth.costs, other.seeds), False
    wanted = [pattern for pattern in truth.scores if half is None or truth.halves[pattern] == half]
    scored = rows.scores(policy, wanted)
    if len(scored) < LEAST:
        return None
    cost = sum(cost for _, cost in scored.values()) / sum(truth.costs[pattern] for pattern in scored)
    right = [truth.scores[pattern] for pattern in scored]
    return Judged(policy, cost, quality([score for score, _ in scored.values()], right, draws=draws), shares)


def choose(judged: Sequence[Judged], limit: float) -> Judged | None:
    """Return the policy of at most ``limit`` of the truth's compute that decides best, by all pairs and the best half.

    Of equals the cheapest. Policies that no budget can be set to, that miss a tenth of the architectures or more, or
    that share trainings with the truth are left out; None where there is no other.
    """
    most = max((one.quality.n for one in judged), default=0)
    fit = [one for one in judged if one.compute_fraction <= limit and one.quality.n > 0.9 * most]
    fit = [one for one in fit if one.policy.signal in SETTABLE and not one.shares_trainings]

    def merit(one: Judged) -> tuple[float, float]:
        best_half = one.quality.accuracy_best_half
        return one.quality.accuracy + (0.0 if best_half is None else best_half), -one.compute_fraction

    return max(fit, key=merit, default=None)


def budget_words(
    decisions: Mapping[str, Any],
    *,
    signal: str,
    rate: str | float,
    active_params: int,
    tokens_per_active_param: float,
    seeds: int = 1,
    what: str = "comparisons",
) -> str:
    """Return one sentence on how far ``what`` can be trusted, from a decisions.json.

    ``rate``: own, halved, or the one rate of all; another word is a policy that no truth set has. Of the measured
    policies with this signal and number of seeds, the one nearest in size, then in tokens, then in its shared rate
    stands for the budget; where it is of another size or length, the sentence says of which, and where there is none,
    that nothing was measured. The default's figures are those of the half that did not choose it. At the truth's own
    size only policies count whose trainings are not those of the truth.
    """
    truth = decisions.get("truth", {})
    alike = [
        one
        for one in decisions["policies"]
        if one["signal"] == signal
        and one["seeds"] == seeds
        and not one.get("first")
        and not one["shares_trainings"]
        and (one["rate"] == rate if isinstance(rate, str) else one["rate"] not in (OWN, HALVED))
    ]
    if not alike:
        return f"how often {what} at this budget are right was not measured"
    whole = truth["tokens_per_active_param"]

    def distance(one: Mapping[str, Any]) -> tuple[float, float, float]:
        off = one["size"] / active_params, one["rung"] * whole / tokens_per_active_param
        own = 1.0 if isinstance(rate, str) else float(one["rate"]) / rate
        return abs(math.log(off[0])), abs(math.log(off[1])), abs(math.log(own))

    nearest = min(alike, key=distance)
    off, named = distance(nearest), ("signal", "size", "rate", "rung", "seeds", "first")
    held_out = decisions.get("reporting")
    if held_out and all(held_out.get(name) == nearest.get(name) for name in named):
        nearest = held_out  # by the architectures that did not choose it
    where = "at this budget"
    if off[0] > math.log(LIKE) or off[1] > math.log(LIKE):
        tokens = nearest["rung"] * whole
        where = (
            f"at {nearest['size']:,} active parameters and {tokens:g} tokens for each, the nearest that was measured,"
        )
    larger, longer = truth["size"] / nearest["size"], 1 / nearest["rung"]
    models = f"fully tuned models {f'{larger:.0f} times larger' if larger > 1 else 'of the same size'}"
    models += f" that trained {longer:.0f} times longer" if longer > 1 else ""
    low, high = (100 * end for end in nearest["accuracy_interval"])
    better = nearest["accuracy_best_half"]
    within = "" if better is None else f", and in {100 * better:.0f} % of those within the better half"
    return (
        f"{what} {where} agree with {models} in "
        f"{100 * nearest['accuracy']:.0f} % of pairs (95 % interval {low:.0f} to {high:.0f} %){within}"
    )


@dataclass(frozen=True)
class StepShare:
    """What share of a baseline's steps a challenger needs to reach the baseline's final loss, at one size."""

    size: int
    seeds: int  # pairs of trainings
    gap: float  # baseline's final loss minus the challenger's, mean over seeds [nats]
    share: float | None  # geometric mean over seeds; none: a seed does not reach it within its training
    interval: tuple[float, float] | None  # 95 %, from the spread of log shares over seeds; none: fewer than two


def step_share(rows: Rows, size: int, challenger: str, baseline: str) -> StepShare | None:
    """Return the step share of two patterns, each at its own best rate; None where one of them is missing.

    Finished models at the rungs make the challenger's curve, interpolated linearly in the logarithm of tokens; a
    challenger that is ahead at the first rung already counts as reaching it there, so that the share is at most that.
    """
    ours, theirs = (
        {seed: row for seed, row in rows.at_best_rate(pattern, size).items() if not row.failed}
        for pattern in (challenger, baseline)
    )
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    gap = fmean(theirs[seed].loss - ours[seed].loss for seed in seeds)
    shares = [_reaches(ours[seed].losses, theirs[seed].loss) for seed in seeds]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return StepShare(size, len(seeds), gap, None, None)
    logs = [math.log(share) for share in known]
    middle = fmean(logs)
    interval = None
    if len(logs) > 1:
        from scipy import stats

        half = float(stats.t.ppf(0.975, len(logs) - 1)) * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
        interval = (math.exp(middle - half), math.exp(middle + half))
    return StepShare(size, len(seeds), gap, math.exp(middle), interval)


def _reaches(losses: Mapping[float, float], target: float) -> float | None:
    """Return the share of a training at which its finished models reach a loss, None where they do not."""
    points = sorted(losses.items())
    for (before, worse), (rung, loss) in zip([(points[0][0], math.inf), *points], points, strict=False):
        if loss <= target:
            if rung == points[0][0]:
                return rung
            part = (worse - target) / (worse - loss)
            return math.exp(math.log(before) + part * math.log(rung / before))
    return None
