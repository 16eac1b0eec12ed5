"""Effects of a search's choices on the score: importance of each choice, effect of each letter and position.

Everything is computed at the first rung, which all trained architectures have reached: the full score is known only
of those that the pruner let through, and these are alike.

A sampler draws some combinations more often than others, so a mean over all architectures with a letter is also a mean
of what it tends to come with. Effects are therefore those of one additive model, fitted by least squares to all
positions (or to the counts of all letters) at once. Their intervals come from leaving out one architecture at a time
(the jackknife, which equals MacKinnon and White's HC3 standard error of 1985) and Student's t: what the model does not
explain differs from architecture to architecture. A bootstrap over architectures needs the same fit on resamples that
often lack a rare letter, and its percentile intervals cover less (``python -m hybridnas.bench coverage``).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridnas.analysis.bootstrap import ALPHA
from hybridnas.arch.pattern import Slot, parse
from hybridnas.errors import HybridNASError
from hybridnas.study.objectives import OBJECTIVES, of_eval
from hybridnas.study.records import COMPLETE, PRUNED, TrialRecord

LEAST = 8  # architectures, and architectures beyond the parameters of a fit; fewer say nothing about a choice
_LEVERAGE = 1 - 1e-9  # of an architecture that alone decides a parameter

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effect:
    """What a letter contributes in place of the average of the others: at a position, or anywhere (position None)."""

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
    """Return the letter of each sub-layer, of a parallel one ``[E,M]``; empty for a pattern of another version."""
    try:
        layers = parse(pattern).layers
    except HybridNASError:
        return []
    return [
        layer.letter
        if isinstance(layer, Slot)
        else f"[{','.join(''.join(slot.letter for slot in branch) for branch in layer.branches)}]"
        for layer in layers
    ]


def position_effects(
    records: Sequence[TrialRecord], scores: Mapping[int, float], *, alpha: float = ALPHA
) -> list[Effect]:
    """Return each letter's effect at each position, the other positions held: letter minus the average of the others.

    Only patterns of the commonest depth have comparable positions. Positions that have the same letter in every
    pattern, as in a repeated motif, are one, the first of them. Empty with fewer than LEAST architectures more than
    parameters.
    """
    rows = _rows(records, scores)
    depths = Counter(len(letters) for letters, _ in rows)
    depth = depths.most_common(1)[0][0] if depths else 0
    rows = [row for row in rows if len(row[0]) == depth]
    columns: dict[tuple[str, ...], int] = {}  # letters of all patterns at a position -> the first such position
    for place in range(depth):
        columns.setdefault(tuple(letters[place] for letters, _ in rows), place)
    blocks: list[F64] = [np.ones((len(rows), 1))]
    wanted: list[tuple[str, int, int, list[int]]] = []  # letter, position, architectures, its columns with it first
    for letters_N, place in columns.items():
        known = sorted(set(letters_N))
        if len(known) < 2:
            continue
        first = sum(block.shape[1] for block in blocks)
        blocks.append(np.array([[letter == own for letter in known] for own in letters_N], dtype=np.float64))
        for index, letter in enumerate(known):
            others = [first + other for other in range(len(known)) if other != index]
            wanted.append((letter, place + 1, letters_N.count(letter), [first + index, *others]))
    if not wanted:
        return []
    found = _contrasts(np.hstack(blocks), [score for _, score in rows], [columns for *_, columns in wanted], alpha)
    return [Effect(letter, place, n, *one) for (letter, place, n, _), one in zip(wanted, found, strict=True) if one]


def letter_effects(
    records: Sequence[TrialRecord], scores: Mapping[int, float], *, alpha: float = ALPHA
) -> list[Effect]:
    """Return the effect of one sub-layer more of each letter, in place of the average of the other letters."""
    rows = _rows(records, scores)
    known = sorted({letter for letters, _ in rows for letter in letters})
    if len(known) < 2:
        return []
    counts = np.array([[letters.count(letter) for letter in known] for letters, _ in rows], dtype=np.float64)
    design = np.hstack([np.ones((len(rows), 1)), counts])
    wanted = [[1 + index, *(1 + other for other in range(len(known)) if other != index)] for index in range(len(known))]
    found = _contrasts(design, [score for _, score in rows], wanted, alpha)
    have = [int((counts[:, index] > 0).sum()) for index in range(len(known))]
    return [Effect(letter, None, n, *one) for letter, n, one in zip(known, have, found, strict=True) if one]


def _rows(records: Sequence[TrialRecord], scores: Mapping[int, float]) -> list[tuple[list[str], float]]:
    return [(letters_of(record.pattern), scores[record.number]) for record in records if record.number in scores]


def _contrasts(
    design_NP: F64, scores: Sequence[float], wanted: Sequence[Sequence[int]], alpha: float
) -> list[tuple[float, float] | None]:
    """Fit scores by least squares and return, for each list of columns, its first minus the mean of the others.

    With each half the width of its interval; None where the data cannot tell, or one architecture alone does.
    """
    from scipy import stats

    scores_N = np.asarray(scores, dtype=np.float64)
    rank = int(np.linalg.matrix_rank(design_NP))
    if len(scores_N) - rank < LEAST:
        return [None] * len(wanted)
    inverse_PN = np.linalg.pinv(design_NP)
    leverage_N = np.einsum("np,pn->n", design_NP, inverse_PN)
    rest_N = scores_N - design_NP @ (inverse_PN @ scores_N)
    seen_PP = inverse_PN @ design_NP
    quantile = float(stats.t.ppf(1 - alpha / 2, len(scores_N) - rank))
    found: list[tuple[float, float] | None] = []
    for first, *others in wanted:
        contrast_P = np.zeros(design_NP.shape[1])
        contrast_P[first] = 1.0
        contrast_P[others] = -1 / len(others)
        weight_N = contrast_P @ inverse_PN
        alone = bool((np.abs(weight_N[leverage_N > _LEVERAGE]) > 1e-9).any())
        if alone or not np.allclose(contrast_P @ seen_PP, contrast_P, atol=1e-8):
            found.append(None)
            continue
        apart_N = np.where(leverage_N > _LEVERAGE, 0.0, rest_N / np.maximum(1 - leverage_N, 1e-12))
        error = float(np.sqrt(((weight_N * apart_N) ** 2).sum()))
        found.append((float(weight_N @ scores_N), quantile * error))
    return found


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
