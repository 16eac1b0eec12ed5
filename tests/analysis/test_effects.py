"""Effects of letters, positions and choices on the score: planted ones are found, intervals are a jackknife's."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats

from hybridnas.analysis import effects as insight
from hybridnas.study.records import TrialRecord

TOKENS = (10, 30, 90)


def record(number, pattern, loss, **fields):
    curve = [{"tokens": t, "valid_loss": loss + 1.0 / t, "accuracy": 0.3} for t in TOKENS]
    given = {
        "state": "COMPLETE", "pattern": pattern, "fingerprint": f"{number:064x}", "valid_loss": curve[-1]["valid_loss"],
        "curve": curve, "rungs": [[entry["tokens"], entry["valid_loss"]] for entry in curve], "tokens": 90,
        "objectives": {"val_loss": curve[-1]["valid_loss"]}, "legs": [[float(number), 90]],
        "choices": {"slot0": pattern[0], "n_experts": 4},
    }  # fmt: skip
    return TrialRecord(number=number, **{**given, **fields})


@pytest.fixture(scope="module")
def study():
    """Forty architectures in which an M at the first place is worth half a nat, and nothing else matters."""
    chance = random.Random(1)
    patterns = ["".join(chance.choice("MAF") for _ in range(4)) for _ in range(40)]
    return [record(n, p, 2.0 - 0.5 * (p[0] == "M") + 0.05 * chance.random()) for n, p in enumerate(patterns)]


def test_a_planted_effect_is_found_and_no_other():
    chance = random.Random(1)
    patterns = ["".join(letters) for letters in itertools.product("MAF", repeat=4)]  # every one once: nothing confounds
    study = [record(n, p, 2.0 - 0.5 * (p[0] == "M") + 0.05 * chance.random()) for n, p in enumerate(patterns)]
    first, scores = insight.first_scores(study)
    assert (first, len(scores)) == (10, 81)
    effects = {(one.position, one.letter): one for one in insight.position_effects(study, scores)}
    assert set(effects) == {(place, letter) for place in (1, 2, 3, 4) for letter in "AFM"}
    assert effects.pop((1, "M")).mean == pytest.approx(-0.5, abs=0.02)
    assert [effects.pop((1, letter)).mean for letter in "AF"] == pytest.approx([0.25, 0.25], abs=0.02)
    assert {key: one.mean for key, one in effects.items()} == pytest.approx(dict.fromkeys(effects, 0.0), abs=0.02)


def test_an_interval_is_that_of_a_jackknife_over_architectures(study):
    _, scores = insight.first_scores(study)
    letters = np.array([list(record.pattern) for record in study])
    y = np.array([scores[record.number] for record in study])
    columns = [(letters[:, place] == letter) for place in range(4) for letter in "AFM"]
    design = np.column_stack([np.ones(len(y)), *columns]).astype(float)
    contrast = np.zeros(13)
    contrast[[4, 5, 6]] = 1, -0.5, -0.5  # A at the second place, against the mean of F and M there

    def estimate(kept):
        return float(contrast @ (np.linalg.pinv(design[kept]) @ y[kept]))

    full = estimate(np.ones(len(y), dtype=bool))
    without = [estimate(np.arange(len(y)) != left) for left in range(len(y))]
    error = math.sqrt(sum((one - full) ** 2 for one in without))
    found = next(one for one in insight.position_effects(study, scores) if (one.position, one.letter) == (2, "A"))
    assert (found.mean, found.n) == (pytest.approx(full), int((letters[:, 1] == "A").sum()))
    assert found.half == pytest.approx(stats.t.ppf(0.975, len(y) - 9) * error, rel=1e-6)
    strict = next(
        one for one in insight.position_effects(study, scores, alpha=0.01) if (one.position, one.letter) == (2, "A")
    )
    assert strict.half / found.half == pytest.approx(stats.t.ppf(0.995, 31) / stats.t.ppf(0.975, 31))


def test_letters_that_come_together_are_told_apart():
    chance = random.Random(3)
    patterns = []
    for _ in range(60):  # an E mostly comes with an M before it, and the M alone matters
        first = chance.choice("MF")
        patterns.append(first + (chance.choice("EEEA") if first == "M" else chance.choice("EAAA")))
    study = [record(n, p, 2.0 - 0.5 * (p[0] == "M") + 0.01 * chance.random()) for n, p in enumerate(patterns)]
    _, scores = insight.first_scores(study)
    found = {(one.position, one.letter): one for one in insight.position_effects(study, scores)}
    have = [scores[r.number] for r in study if r.pattern[1] == "E"]
    rest = [scores[r.number] for r in study if r.pattern[1] != "E"]
    assert np.mean(have) - np.mean(rest) < -0.1
    assert abs(found[2, "E"].mean) < found[2, "E"].half < 0.01
    assert found[1, "M"].mean == pytest.approx(-0.5, abs=0.01)


def test_what_the_architectures_cannot_tell_has_no_effect():
    chance = random.Random(4)
    halves = ["".join(chance.choice("MF") for _ in range(2)) for _ in range(30)]
    study = [record(n, 2 * p, 2.0 + 0.1 * chance.random()) for n, p in enumerate(halves)]  # a repeated motif
    _, scores = insight.first_scores(study)
    assert {one.position for one in insight.position_effects(study, scores)} == {1, 2}
    once = [*study, record(30, "AFAF", 1.0)]  # one architecture alone has the letter
    _, scores = insight.first_scores(once)
    assert "A" not in {one.letter for one in insight.position_effects(once, scores)}
    assert insight.position_effects(study[:9], scores) == insight.letter_effects(study[:9], scores) == []
    assert insight.letter_effects([record(n, "MMMM", 1.0 + n) for n in range(20)], dict.fromkeys(range(20), 1.0)) == []


def test_the_choice_that_matters_is_the_most_important(study):
    _, scores = insight.first_scores(study)
    noise = random.Random(2)
    varied = [dataclasses.replace(r, choices={"first": r.pattern[0], "noise": noise.randrange(3)}) for r in study]
    shares = insight.importances(varied, scores)
    assert max(shares, key=shares.get) == "first"
    assert sum(shares.values()) == pytest.approx(1.0)
    assert insight.importances(varied[:3], scores) == {}
    assert insight.importances(study[:0], {}) == {}


def test_letters_are_read_from_any_pattern():
    assert insight.letters_of("(ME)x2") == ["M", "E", "M", "E"]
    assert insight.letters_of("M{d_state=8}[M,E]") == ["M", "[E,M]"]
    assert insight.letters_of("not a pattern") == []


def test_scores_are_taken_where_all_have_been(study):
    short = dataclasses.replace(study[0], state="PRUNED", rungs=study[0].rungs[:1], curve=study[0].curve[:1])
    assert insight.first_scores([short, *study[1:]])[0] == 10
    assert insight.first_scores([]) == (0, {})
    accurate = dataclasses.replace(study[0], objectives={"accuracy": 0.3})
    assert insight.first_scores([accurate])[1] == {0: -0.3}
