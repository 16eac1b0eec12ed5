"""The difference of two trained architectures: its interval over seeds and documents, its p-value, Holm's adjustment.

Two sources of error enter. Another seed changes weights and the order of the data; other documents change what is
measured. Both architectures are trained with the same seeds and measured on the same documents, so everything is
paired. With S seeds and D documents, d(s, i) being the difference that seed s makes on document i, the variance is
that of the seeds' means over S, plus that of a bootstrap over documents of the mean over seeds; what the two have in
common, the interaction of seeds and documents, is taken off once (a crossed random-effects model; Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 2007). Seeds are few: resampling four of them gives 35 samples and
intervals that are too narrow, so their part enters by Student's t with Satterthwaite's degrees of freedom, or, with
fewer than four seeds, where that would be too few still, with the seeds' own. Coverage is measured by
``python -m hybridnas.bench coverage``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hybridnas.study.documents import DocumentSums

ALPHA = 0.05  # significance level; intervals have a level of 1 - ALPHA
LEAST_DOCUMENTS = 5  # fewer give no interval over documents
FEWEST_FREEDOM = 3  # of Satterthwaite's approximation: with less, intervals cover 87 to 93 % instead of 95 %
RESAMPLES = 1000
_CHUNK = 1 << 22  # of resampled counts at a time [count]

F64 = npt.NDArray[np.float64]
Pairs = Mapping[str, tuple[DocumentSums, DocumentSums]]  # seed -> what both architectures lost on the test part


@dataclass(frozen=True)
class Difference:
    """The mean of first minus second, less is better: negative where the first is better."""

    mean: float
    half: float | None  # half the width of the interval; None where there is too little for one
    p: float | None  # two-sided, of no difference; None with half
    seeds: int  # that both were trained with
    documents: int = 0  # over which the interval is, too; 0: over seeds alone
    level: float = 1 - ALPHA

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    @property
    def sources(self) -> str:
        """Say over what the interval is."""
        seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        if not self.documents:
            return seeds
        return f"{self.documents} documents, {seeds}" if self.seeds == 1 else f"{seeds} and {self.documents} documents"

    def words(self, unit: str) -> str:
        """Write the difference with its interval: ``-0.0243 ± 0.0101 nats per token (95% interval over ...)``."""
        if self.half is None:
            return f"{self.mean:+.4f} {unit} ({self.sources}: too few for an interval)"
        return f"{self.mean:+.4f} ± {self.half:.4f} {unit} ({100 * self.level:g}% interval over {self.sources})"


def difference(
    first: Mapping[str, float | None],
    second: Mapping[str, float | None],
    documents: Pairs | None = None,
    *,
    alpha: float = ALPHA,
) -> Difference:
    """Compare two architectures seed by seed; a seed that failed in either is left out.

    ``first``, ``second``: seed -> result, so that less is better. ``documents``: what both lost on each document, of
    the same figure; the interval is over documents, too, where every seed has them, and over documents alone where
    there is one seed.
    """
    gaps = {
        seed: value - other for seed, value in first.items() if value is not None
        and (other := second.get(seed)) is not None
    }  # fmt: skip
    if not gaps:
        return Difference(math.nan, None, None, 0, level=1 - alpha)
    known = _table(documents or {}, list(gaps))
    mean = float(np.mean(list(gaps.values())))
    n = len(gaps)
    parts = []
    if n > 1:
        parts.append(_Part(float(np.var(list(gaps.values()), ddof=1)) / n, n - 1))
    shared = 0.0
    if known is not None:
        over, shared = _document_part(*known)
        parts.append(over)
    if not parts:
        return Difference(mean, None, None, n, level=1 - alpha)
    half, p = _t_interval(mean, parts, shared, alpha)
    return Difference(mean, half, p, n, 0 if known is None else known[0].shape[1], 1 - alpha)


class _Part(NamedTuple):
    """One source of error: the variance of the mean that it causes, and its degrees of freedom."""

    variance: float
    freedom: float


def _t_interval(mean: float, parts: Sequence[_Part], shared: float, alpha: float) -> tuple[float, float]:
    """Return half the width of the interval and the p-value; ``shared``: variance that two parts both contain."""
    from scipy import stats

    largest = max(part.variance for part in parts)
    variance = max(sum(part.variance for part in parts) - shared, largest)
    if variance == 0:
        return 0.0, 1.0 if mean == 0 else 0.0
    fewest = min(part.freedom for part in parts)
    freedom = max(fewest, variance**2 / sum(part.variance**2 / part.freedom for part in parts))
    if fewest < FEWEST_FREEDOM:
        freedom = fewest
    half = float(stats.t.ppf(1 - alpha / 2, freedom)) * math.sqrt(variance)
    return half, float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom))


def _table(documents: Pairs, seeds: Sequence[str]) -> tuple[F64, F64] | None:
    """Return the differences in nats (S, D) and the places (D,); None where a seed lacks them or documents differ."""
    pairs = [documents[seed] for seed in seeds if seed in documents]
    if len(pairs) < len(seeds):
        return None
    start = pairs[0][0]
    if not all(one.same_places(start) for pair in pairs for one in pair):
        return None
    places_D = np.array(start.tokens, dtype=np.float64)
    if len(places_D) < LEAST_DOCUMENTS or _effective(places_D) <= 2:
        return None
    return np.array([np.subtract(ours.nats, theirs.nats) for ours, theirs in pairs]), places_D


def _effective(places_D: F64) -> float:
    """Return how many documents of equal length would weigh as much as these."""
    return float(places_D.sum() ** 2 / (places_D**2).sum())


def _document_part(nats_SD: F64, places_D: F64) -> tuple[_Part, float]:
    """Return the variance over documents of the mean over seeds, and what of it is the seeds' interaction with them.

    The mean is a ratio, nats over places, so documents are resampled with both. A bootstrap's variance is too small by
    1/D where all documents are as long; ``grow`` is that for documents of unequal length.
    """
    total, share_D = places_D.sum(), places_D / places_D.sum()
    squares = (share_D**2).sum()
    grow = squares / (share_D**2 * (1 - 2 * share_D + squares)).sum()
    nats_D = nats_SD.mean(axis=0)
    rng = np.random.default_rng(0)  # the same records give the same report
    count = len(places_D)
    means: list[F64] = []
    for first in range(0, RESAMPLES, step := max(1, _CHUNK // count)):
        times_RD = rng.multinomial(count, np.full(count, 1 / count), size=min(step, RESAMPLES - first))
        means.append((times_RD @ nats_D) / (times_RD @ places_D))
    over = _Part(float(grow * np.var(np.concatenate(means), ddof=1)), _effective(places_D) - 1)
    seeds = len(nats_SD)
    if seeds == 1:
        return over, 0.0
    own_SD = nats_SD - places_D * (nats_SD.sum(axis=1, keepdims=True) / total)
    rest_SD = own_SD - own_SD.mean(axis=0)
    return over, float(grow * (rest_SD**2).sum() / (total**2 * seeds * (seeds - 1)))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down method, in the order given."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted = [0.0] * len(values)
    worst = 0.0
    for place, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = worst
    return adjusted


def mean_interval(values: Sequence[float], alpha: float = ALPHA) -> tuple[float, float | None]:
    """Return the mean of independent values and half its t-interval; None for the half where there is one value."""
    from scipy import stats

    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(1 - alpha / 2, n - 1)) * deviation / math.sqrt(n)
