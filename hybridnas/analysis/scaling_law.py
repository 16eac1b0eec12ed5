"""Scaling laws: loss over parameters and tokens, L(N, D) = E + A / N^a + B / D^b, with bootstrap intervals.

The form of Hoffmann et al. (arXiv 2203.15556, approach 3): least squares on log losses with Huber's loss, from several
starts. Intervals come from a wild bootstrap over runs: all residuals of one run (a size and a seed, measured at several
token counts) change sign together, since they share weights and data, and runs of equal size and seed of two
architectures change sign together, so that intervals of a difference are paired.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95  # of intervals
LEAST_SIZES, LEAST_TOKENS, PARAMETERS = 3, 3, 5  # what a fit needs: sizes, token counts, and more points than unknowns
LEAST_RUNS = 4  # for an interval: fewer runs, of any size and seed, say nothing about noise between runs
_HUBER = 0.01  # relative deviations above this count linearly [1]
_EXPONENTS = (0.02, 2.0)  # range of a and b
_ITERATIONS = 80  # of damped Gauss-Newton steps
_STILL = 1e-6  # steps below this end the iterations
_GRID = 64  # points between two sizes at which a crossing is looked for


class Point(NamedTuple):
    """One measured loss. ``run``: what the noise has in common with other points, such as (size, seed)."""

    params: float  # [count]
    tokens: float  # [count]
    loss: float  # [nats per token]
    run: tuple[float, int] = (0.0, 0)


class Interval(NamedTuple):
    """A figure and its bootstrap interval; its ends are not a number where there were too few runs for one."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def __str__(self) -> str:
        if not self.known:
            return f"{self.value:.4f} (too few runs for an interval)"
        return f"{self.value:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / (N / n_unit)^a + B / (D / d_unit)^b, in nats per token.

    ``n_unit`` and ``d_unit`` are the middle of the measured range, where the terms are known best: A and B are the
    losses there that more parameters and more tokens would take away.
    """

    E: float
    A: float
    a: float
    B: float
    b: float
    n_unit: float
    d_unit: float

    def loss(self, params: float, tokens: float) -> float:
        """Return the predicted loss at so many parameters and training tokens."""
        return float(self.E + self.A * (params / self.n_unit) ** -self.a + self.B * (tokens / self.d_unit) ** -self.b)


@dataclass(frozen=True)
class Fit:
    """A law, its bootstrap resamples, and the relative root-mean-square deviation from the points."""

    law: Law
    resampled: tuple[Law, ...]
    deviation: float  # [1]

    def predict(self, params: float, tokens: float) -> Interval:
        """Return the predicted loss with its interval."""
        return _interval(self.law.loss(params, tokens), [law.loss(params, tokens) for law in self.resampled])

    def coefficient(self, name: str) -> Interval:
        """Return E, A, a, B or b with its interval."""
        return _interval(getattr(self.law, name), [getattr(law, name) for law in self.resampled])


def too_few(points: Sequence[Point]) -> str:
    """Say what is missing for a fit, in words; empty where nothing is."""
    sizes, tokens = {point.params for point in points}, {point.tokens for point in points}
    if len(sizes) < LEAST_SIZES:
        return f"a fit needs {LEAST_SIZES} sizes, got {len(sizes)}"
    if len(tokens) < LEAST_TOKENS or len(points) <= PARAMETERS:
        return (
            f"a fit needs {LEAST_TOKENS} token counts and more than {PARAMETERS} losses, got {len(tokens)} and "
            f"{len(points)}"
        )
    per_size = max(len({point.tokens for point in points if point.params == size}) for size in sizes)
    return "" if per_size > 1 else "a fit needs one size with several token counts, got one at each size"


def fit_law(points: Sequence[Point], *, resamples: int = 200, seed: int = 0) -> Fit:
    """Fit the law to the points and to ``resamples`` wild-bootstrap copies of them.

    ``seed`` draws the signs of the runs: fits that share it can be compared in pairs. Raises ValueError for points
    that :func:`too_few` refuses.
    """
    import numpy as np

    missing = too_few(points)
    if missing:
        raise ValueError(missing)
    n_P, d_P, loss_P = (np.array([point[i] for point in points], dtype=float) for i in range(3))
    units = float(np.exp(np.log(n_P).mean())), float(np.exp(np.log(d_P).mean()))
    n_P, d_P, log_P = np.log(n_P / units[0]), np.log(d_P / units[1]), np.log(loss_P)
    starts = np.array(_starts(loss_P))
    tried = _solve(starts, n_P, d_P, np.tile(log_P, (len(starts), 1)))
    best = _polished(tried[np.argmin(_huber(_log_loss(tried, n_P, d_P) - log_P))], n_P, d_P, log_P)
    fitted_P = _log_loss(best, n_P, d_P)
    runs = sorted({point.run for point in points})
    count = resamples if len(runs) >= LEAST_RUNS else 0
    sign_RP = np.array([[_sign(seed, number, point.run) for point in points] for number in range(count)])
    laws = []
    if count:
        copies_RP = fitted_P + sign_RP * (log_P - fitted_P) * _inflation(len(points), len(runs))
        laws = [_law(theta, units) for theta in _solve(np.tile(best, (count, 1)), n_P, d_P, copies_RP)]
    deviation = float(np.sqrt(np.mean((log_P - fitted_P) ** 2)))
    return Fit(_law(best, units), tuple(laws), deviation)


def _inflation(points: int, runs: int) -> float:
    """Return by how much residuals are scaled up in resamples.

    A fit takes up five of the points, and three unknowns (E, A, a) of what runs have alone: residuals are smaller than
    the noise. With few runs, their spread is itself uncertain: Student's t over the normal quantile.
    """
    from scipy import stats

    free = runs - LEAST_RUNS + 1
    taken = math.sqrt(max(points / (points - PARAMETERS), runs / free))
    level = 0.5 + LEVEL / 2
    return taken * float(stats.t.ppf(level, free) / stats.norm.ppf(level))


def difference(first: Fit, second: Fit, params: float, tokens: float) -> Interval:
    """Return the predicted difference of two losses (negative: the first is lower), paired by resample."""
    pairs = zip(first.resampled, second.resampled, strict=True)
    gaps = [one.loss(params, tokens) - other.loss(params, tokens) for one, other in pairs]
    return _interval(first.law.loss(params, tokens) - second.law.loss(params, tokens), gaps)


@dataclass(frozen=True)
class Crossing:
    """Where two fits cross on a line of constant tokens per parameter."""

    params: tuple[float, ...]  # parameters of each crossing in the range, rising; empty: none
    share: float  # part of the resamples that cross in the range [0 to 1]


def crossings(first: Fit, second: Fit, low: float, high: float, tokens_per_param: float) -> Crossing:
    """Find where two laws are equal between ``low`` and ``high`` parameters, each trained for so many tokens."""
    pairs = zip(first.resampled, second.resampled, strict=True)
    found = [_crossed(*laws, low, high, tokens_per_param) for laws in pairs]
    share = sum(bool(places) for places in found) / len(found) if found else math.nan
    return Crossing(tuple(_crossed(first.law, second.law, low, high, tokens_per_param)), share)


def _crossed(one: Law, other: Law, low: float, high: float, tokens_per_param: float) -> list[float]:
    from scipy.optimize import brentq

    def gap(log_n: float) -> float:
        n = math.exp(log_n)
        return one.loss(n, tokens_per_param * n) - other.loss(n, tokens_per_param * n)

    ends = [math.log(low) + (math.log(high) - math.log(low)) * i / _GRID for i in range(_GRID + 1)]
    gaps = [gap(end) for end in ends]
    spans = zip(itertools.pairwise(ends), itertools.pairwise(gaps), strict=True)
    return [math.exp(brentq(gap, *span)) for span, (before, after) in spans if before * after < 0]


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    import numpy as np

    if not resampled:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(np.array(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _law(theta: NDArray[Any], units: tuple[float, float]) -> Law:
    e, p, a, q, b = (float(value) for value in theta)
    return Law(math.exp(e), math.exp(p), a, math.exp(q), b, *units)


def _terms(theta: NDArray[Any], n_P: NDArray[Any], d_P: NDArray[Any]) -> NDArray[Any]:
    """Return the logarithms of the three terms, (..., 3, P); theta (..., 5): log E, log A, a, log B, b."""
    import numpy as np

    e, p, a, q, b = np.moveaxis(theta[..., None], -2, 0)
    found: NDArray[Any] = np.stack([e + 0 * n_P, p - a * n_P, q - b * d_P], axis=-2)
    return found


def _log_loss(theta: NDArray[Any], n_P: NDArray[Any], d_P: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    found: NDArray[Any] = np.log(np.exp(_terms(theta, n_P, d_P)).sum(axis=-2))
    return found


def _solve(starts_R5: NDArray[Any], n_P: NDArray[Any], d_P: NDArray[Any], log_RP: NDArray[Any]) -> NDArray[Any]:
    """Return the nearest minimum to each start for its own losses, (R, 5): damped Gauss-Newton on R fits at once."""
    import numpy as np

    low, high = _bounds(log_RP)
    theta_R5: NDArray[Any] = np.clip(starts_R5, low, high)
    damping_R = np.full(len(theta_R5), 1e-2)
    cost_R = _huber(_log_loss(theta_R5, n_P, d_P) - log_RP)
    for _ in range(_ITERATIONS):
        residual_RP = _log_loss(theta_R5, n_P, d_P) - log_RP
        weight_RP = np.minimum(1.0, _HUBER / np.maximum(np.abs(residual_RP), 1e-12))
        jacobian_RP5 = _jacobian(theta_R5, n_P, d_P)
        weighted_R5P = np.swapaxes(jacobian_RP5 * weight_RP[..., None], 1, 2)
        normal_R55 = weighted_R5P @ jacobian_RP5
        damped_R5 = damping_R[:, None] * np.einsum("rii->ri", normal_R55) + 1e-12
        gradient_R51 = weighted_R5P @ residual_RP[..., None]
        step_R5 = np.linalg.solve(normal_R55 + damped_R5[:, :, None] * np.eye(PARAMETERS), gradient_R51)[..., 0]
        tried_R5 = np.clip(theta_R5 - step_R5, low, high)
        if np.abs(tried_R5 - theta_R5).max() < _STILL:
            break
        tried_R = _huber(_log_loss(tried_R5, n_P, d_P) - log_RP)
        better_R = tried_R < cost_R
        theta_R5 = np.where(better_R[:, None], tried_R5, theta_R5)
        cost_R = np.where(better_R, tried_R, cost_R)
        damping_R = np.clip(np.where(better_R, damping_R / 3, damping_R * 4), 1e-9, 1e6)
    return theta_R5


def _polished(start: NDArray[Any], n_P: NDArray[Any], d_P: NDArray[Any], log_P: NDArray[Any]) -> NDArray[Any]:
    """Return the minimum near a start, by scipy."""
    import numpy as np
    from scipy.optimize import least_squares

    low, high = _bounds(log_P)
    found = least_squares(
        lambda theta: _log_loss(theta, n_P, d_P) - log_P,
        np.clip(start, low + 1e-9, high - 1e-9),
        jac=lambda theta: _jacobian(theta, n_P, d_P),
        bounds=(low, high),
        loss="huber",
        f_scale=_HUBER,
        x_scale="jac",
    )
    best: NDArray[Any] = found.x
    return best


def _bounds(log_P: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    import numpy as np

    top, least = float(log_P.max()) + 1.0, float(log_P.min())
    low = np.array([least - 10.0, least - 10.0, _EXPONENTS[0], least - 10.0, _EXPONENTS[0]])
    return low, np.array([least, top, _EXPONENTS[1], top, _EXPONENTS[1]])


def _jacobian(theta: NDArray[Any], n_P: NDArray[Any], d_P: NDArray[Any]) -> NDArray[Any]:
    """Return the derivatives of the log losses, (..., P, 5)."""
    import numpy as np

    terms = np.exp(_terms(theta, n_P, d_P))
    e, a, b = np.moveaxis(terms / terms.sum(axis=-2, keepdims=True), -2, 0)
    found: NDArray[Any] = np.stack([e, a, -a * n_P, b, -b * d_P], axis=-1)
    return found


def _huber(residual: NDArray[Any]) -> NDArray[Any]:
    import numpy as np

    size = np.abs(residual)
    found: NDArray[Any] = np.where(size <= _HUBER, size**2, 2 * _HUBER * size - _HUBER**2).sum(axis=-1)
    return found


def _starts(loss_P: NDArray[Any]) -> list[tuple[float, ...]]:
    """Return starts that share out the loss between its three terms, with small and large exponents."""
    least, middle = float(loss_P.min()), float(loss_P.mean())
    found: list[tuple[float, ...]] = []
    for part, a, b in itertools.product((0.3, 0.6, 0.9), (0.2, 0.7), (0.2, 0.7)):
        rest = math.log((middle - part * least) / 2)
        found.append((math.log(part * least), rest, a, rest, b))
    return found


def _sign(seed: int, number: int, run: tuple[float, int]) -> float:
    """Return -1 or 1 for a run in a resample, the same whatever the order of the points."""
    import hashlib

    text = f"{seed} {number} {run[0]:g} {run[1]}".encode()
    return 1.0 if hashlib.blake2b(text, digest_size=1).digest()[0] & 1 else -1.0
