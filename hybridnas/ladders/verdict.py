"""What a ladder says: a scaling law for each architecture, its test on held-out sizes, and each pair's order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from hybridnas.analysis.scaling_law import (
    LEVEL,
    Crossing,
    Fit,
    Interval,
    Point,
    crossings,
    difference,
    fit_law,
    too_few,
)
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.rows import Row, mean_losses
from hybridnas.units import human, several

AHEAD = (10, 100)  # times the compute of the largest rung, at the same tokens per parameter


@dataclass(frozen=True)
class HeldOut:
    """A size that a fit has not seen: what it measured and what was predicted."""

    size: float
    active_params: int
    tokens: int
    measured: float  # mean over seeds [nats per token]
    predicted: Interval

    @property
    def error(self) -> float:
        """Predicted minus measured [nats per token]."""
        return self.predicted.value - self.measured

    @property
    def inside(self) -> bool | None:
        """Whether the interval of the prediction holds what was measured; None without an interval."""
        return None if not self.predicted.known else self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True)
class ModelVerdict:
    """One architecture's law."""

    name: str
    fit: Fit | None  # over all sizes; None: too few points
    why: str  # what is missing for a fit, in words
    held_out: tuple[HeldOut, ...] = ()  # by the fit without the largest sizes
    why_untested: str = ""  # why nothing was held out
    ahead: tuple[tuple[int, float, float, Interval], ...] = ()  # times the compute, parameters, tokens, loss


@dataclass(frozen=True)
class Gap:
    """The difference of two architectures at one size, at the most tokens; negative: the first is lower."""

    size: float
    mean: float  # [nats per token]
    half: float | None  # half the paired t interval over seeds; None with one seed


@dataclass(frozen=True)
class PairVerdict:
    """Two architectures, the first the lower one at the largest size."""

    first: str
    second: str
    gaps: tuple[Gap, ...]
    crossing: Crossing | None = None  # within the measured sizes and up to 100 times the compute; None: no fits
    ahead: tuple[tuple[int, Interval], ...] = ()  # times the compute, difference of the predictions

    @property
    def held(self) -> bool:
        """Whether the first is lower at every size."""
        return all(gap.mean < 0 for gap in self.gaps)

    def sentence(self) -> str:
        """Say which is lower at which sizes, where the fits cross, and what they predict."""
        lower = [gap.size for gap in self.gaps if gap.mean < 0]
        widths = [abs(gap.mean) for gap in self.gaps]
        clear = sum(gap.half is not None and abs(gap.mean) > gap.half for gap in self.gaps)
        sure = f"beyond the seeds' 95 % interval at {clear} of {len(self.gaps)}"
        if all(gap.half is None for gap in self.gaps):
            sure = "one seed, so no interval"
        if self.held:
            text = f"{self.first} is below {self.second} at {_sizes(len(self.gaps))}"
            text += f", by {min(widths):.4f} to {max(widths):.4f} nats, {sure}"
        else:
            named = ", ".join(f"{size:g}" for size in lower)
            text = f"{self.first} and {self.second} change places: {self.first} is lower at size {named} alone, {sure}"
        if self.crossing is not None:
            found = self.crossing
            places = " and ".join(human(n) for n in found.params)
            text += f"; the fits cross at {places} active parameters" if places else "; the fits do not cross"
            text += "" if math.isnan(found.share) else f" ({found.share:.0%} of resamples cross)"
        for times, gap in self.ahead:
            sure = f" ({gap.low:+.4f} to {gap.high:+.4f})" if gap.known else ""
            text += f"; at {times} times the compute {gap.value:+.4f}{sure}"
        return text


@dataclass(frozen=True)
class Verdict:
    """All that a ladder says."""

    models: tuple[ModelVerdict, ...] = ()
    pairs: tuple[PairVerdict, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)


def judge(rows: Sequence[Row], config: LadderConfig, target: int) -> Verdict:
    """Fit each architecture, test the fits on the held-out sizes, and compare every pair."""
    names = list(dict.fromkeys(row.model for row in rows))
    if not names:
        return Verdict(notes=("no run is finished yet",))
    sizes = sorted({row.size for row in rows})
    largest = max((row.size, row.tokens) for row in rows)
    ratio = largest[1] / (target * largest[0])  # tokens per active parameter of the largest rung
    top = target * largest[0]
    places = [(times, top * times**0.5, largest[1] * times**0.5) for times in AHEAD]
    models = tuple(_model(name, [row for row in rows if row.model == name], config, places) for name in names)
    fits = {model.name: model.fit for model in models if model.fit is not None}
    pairs = []
    for one, other in itertools.combinations(names, 2):
        gaps = _gaps(rows, one, other)
        if not gaps:
            continue
        if gaps[-1].mean > 0:
            one, other, gaps = other, one, _gaps(rows, other, one)
        crossing, ahead = None, tuple[tuple[int, Interval], ...]()
        if one in fits and other in fits:
            pair = fits[one], fits[other]
            crossing = crossings(*pair, target * sizes[0], top * AHEAD[-1] ** 0.5, ratio)
            ahead = tuple((times, difference(*pair, n, d)) for times, n, d in places)
        pairs.append(PairVerdict(one, other, gaps, crossing, ahead))
    return Verdict(models, tuple(pairs))


def _model(
    name: str, own: Sequence[Row], config: LadderConfig, places: Sequence[tuple[int, float, float]]
) -> ModelVerdict:
    points = [Point(row.active_params, row.tokens, row.valid_loss, (row.size, row.seed)) for row in own]
    missing = too_few(points)
    if missing:
        return ModelVerdict(name, None, missing)
    fit = fit_law(points, resamples=config.resamples)
    ahead = tuple((times, n, d, fit.predict(n, d)) for times, n, d in places)
    hidden = config.sizes[len(config.sizes) - config.hold_out :] if config.hold_out else ()
    if not hidden:
        return ModelVerdict(name, fit, "", ahead=ahead, why_untested="hold_out=0")
    seen = [point for point in points if point.run[0] not in hidden]
    missing = too_few(seen)
    if missing:
        return ModelVerdict(name, fit, "", ahead=ahead, why_untested=f"without the held-out sizes {missing}")
    test = fit_law(seen, resamples=config.resamples)
    means = mean_losses(row for row in own if row.size in hidden)
    params = {row.size: row.active_params for row in own}
    held_out = tuple(
        HeldOut(size, params[size], tokens, loss, test.predict(params[size], tokens))
        for (_, size, tokens), loss in sorted(means.items())
    )
    return ModelVerdict(name, fit, "", held_out, ahead=ahead)


def _gaps(rows: Sequence[Row], one: str, other: str) -> tuple[Gap, ...]:
    """Return the paired differences at each size that both have, at the most tokens."""
    found = []
    for size in sorted({row.size for row in rows}):
        same = [row for row in rows if row.size == size]
        last = max(row.tokens for row in same)
        losses = {(row.model, row.seed): row.valid_loss for row in same if row.tokens == last}
        seeds = sorted(
            {seed for name, seed in losses if name == one} & {seed for name, seed in losses if name == other}
        )
        gaps = [losses[one, seed] - losses[other, seed] for seed in seeds]
        if gaps:
            found.append(Gap(size, fmean(gaps), _half_width(gaps) if len(gaps) > 1 else None))
    return tuple(found)


def _half_width(gaps: Sequence[float]) -> float:
    """Return half the width of the t interval of a mean; of at least two values."""
    from scipy import stats

    return float(stats.t.ppf(0.5 + LEVEL / 2, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))


def _sizes(count: int) -> str:
    return "its one size" if count == 1 else f"all {several(count, 'size')}"
