"""Effects of a search's choices on the score: importance of each choice, effect of each letter and position.

Everything is computed at the first rung, which all trained architectures have reached: the full score is known only
of those that the pruner let through, and these are alike.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybridnas.analysis.confirmation import LEVEL
from hybridnas.arch.pattern import Slot, parse
from hybridnas.errors import HybridNASError
from hybridnas.study.objectives import OBJECTIVES, of_eval
from hybridnas.study.records import COMPLETE, PRUNED, TrialRecord

LEAST = 8  # architectures; fewer say nothing about a choice


@dataclass(frozen=True)
class Effect:
    """What a letter contributes: at a position against all others there, or for each further sub-layer (None)."""

    letter: str
    position: int | None  # from 1
    n: int  # architectures that have it
    mean: float  # difference of scores, less is better
    half: float  # half the width of the interval


def first_scores(records: Sequence[TrialRecord]) -> tuple[int, dict[int, float]]:
    """Return the first rung's tokens and what each trained architecture reached there, so that less is better."""
    trained = {record.fingerprint or str(record.number): record for record in reversed(records) if _trained(record)}
    rungs = [{int(tokens) for tokens, _ in record.rungs} for record in trained.values()]
    common = set.intersection(*rungs) if rungs else set()
    if not common:
        return 0, {}
    first = min(common)
    found = {}
    for record in trained.values():
        name = next((name for name in record.objectives if name in ("val_loss", "accuracy")), "val_loss")
        entry = next((entry for entry in record.curve if entry.get("tokens") == first), None)
        entry = entry or {"valid_loss": next(loss for tokens, loss in record.rungs if tokens == first)}
        value = of_eval([name], {}, entry).get(name)
        if value is not None and math.isfinite(value):
            found[record.number] = OBJECTIVES[name].turned(value)
    return first, found


def _trained(record: TrialRecord) -> bool:
    return record.state in (COMPLETE, PRUNED) and bool(record.rungs)


def letters_of(pattern: str) -> list[str]:
    """Return the letter of each sub-layer, branches of parallel ones joined; empty for a pattern of another version."""
    try:
        layers = parse(pattern).layers
    except HybridNASError:
        return []
    return [
        layer.letter
        if isinstance(layer, Slot)
        else "".join(slot.letter for branch in layer.branches for slot in branch)
        for layer in layers
    ]


def position_effects(records: Sequence[TrialRecord], scores: Mapping[int, float]) -> list[Effect]:
    """Return each letter's difference at each position to all other letters there, with Welch's interval.

    Only patterns of the commonest depth have comparable positions. Effects are marginal: the other positions vary.
    """
    rows = [(letters_of(record.pattern), scores[record.number]) for record in records if record.number in scores]
    depths = Counter(len(letters) for letters, _ in rows)
    if not depths:
        return []
    depth = depths.most_common(1)[0][0]
    rows = [row for row in rows if len(row[0]) == depth]
    found = []
    for place in range(depth):
        for letter in sorted({letters[place] for letters, _ in rows}):
            have = [score for letters, score in rows if letters[place] == letter]
            rest = [score for letters, score in rows if letters[place] != letter]
            half = _welch(have, rest)
            if half is not None:
                mean = statistics.fmean(have) - statistics.fmean(rest)
                found.append(Effect(letter, place + 1, len(have), mean, half))
    return found


def letter_effects(records: Sequence[TrialRecord], scores: Mapping[int, float]) -> list[Effect]:
    """Return how the score changes with each further sub-layer of a letter: a least-squares slope with its interval."""
    rows = [(letters_of(record.pattern), scores[record.number]) for record in records if record.number in scores]
    found = []
    for letter in sorted({letter for letters, _ in rows for letter in letters}):
        xs = [letters.count(letter) for letters, _ in rows]
        fitted = _slope(xs, [score for _, score in rows])
        if fitted is not None:
            found.append(Effect(letter, None, sum(x > 0 for x in xs), *fitted))
    return found


def _welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return half the width of the interval of a difference of means whose variances differ."""
    if len(a) < 2 or len(b) < 2:
        return None
    from scipy import stats

    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    if sum(parts) == 0:
        return None
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (a, b), strict=True))
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * math.sqrt(sum(parts))


def _slope(xs: Sequence[int], ys: Sequence[float]) -> tuple[float, float] | None:
    if len(set(xs)) < 2 or len(xs) < 4:
        return None
    from scipy import stats

    fitted = stats.linregress(xs, ys)
    return float(fitted.slope), float(stats.t.ppf(0.5 + LEVEL / 2, len(xs) - 2) * fitted.stderr)


def importances(records: Sequence[TrialRecord], scores: Mapping[int, float]) -> dict[str, float]:
    """Return each choice's share of what separates the best tenth from all others (PED-ANOVA), the largest first.

    Empty with fewer than LEAST scored candidates, or where they differ in nothing.
    """
    rows = [(record.choices, scores[record.number]) for record in records if record.number in scores and record.choices]
    values: dict[str, dict[str, object]] = {}
    for choices, _ in rows:
        for name, value in choices.items():
            values.setdefault(name, {})[repr(value)] = value
    varied = {name: sorted(found) for name, found in values.items() if len(found) > 1}
    if len(rows) < LEAST or not varied or len({score for _, score in rows}) < 2:
        return {}
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a study in memory is none of the user's
    try:
        return _ped_anova(rows, varied)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _ped_anova(
    rows: Sequence[tuple[Mapping[str, object], float]], varied: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    import optuna

    study = optuna.create_study()
    for choices, score in rows:
        params = {name: repr(value) for name, value in choices.items() if name in varied}
        kinds: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(varied[name]) for name in params
        }
        study.add_trial(optuna.trial.create_trial(value=score, params=params, distributions=kinds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except (ValueError, RuntimeError):  # too few in its best tenth to compare
            return {}
    return {name: share for name, share in found.items() if math.isfinite(share)}
