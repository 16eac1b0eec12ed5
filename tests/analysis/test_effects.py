"""Effects of letters, positions and choices on the score: planted ones are found, intervals are those of scipy."""

import dataclasses
import itertools
import random

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


def test_an_interval_is_welchs(study):
    _, scores = insight.first_scores(study)
    have = [scores[r.number] for r in study if r.pattern[1] == "A"]
    rest = [scores[r.number] for r in study if r.pattern[1] != "A"]
    found = next(one for one in insight.position_effects(study, scores) if (one.position, one.letter) == (2, "A"))
    low, high = stats.ttest_ind(have, rest, equal_var=False).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))


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
    assert insight.letters_of("M{d_state=8}[M,E]") == ["M", "EM"]
    assert insight.letters_of("not a pattern") == []


def test_scores_are_taken_where_all_have_been(study):
    short = dataclasses.replace(study[0], state="PRUNED", rungs=study[0].rungs[:1], curve=study[0].curve[:1])
    assert insight.first_scores([short, *study[1:]])[0] == 10
    assert insight.first_scores([]) == (0, {})
    accurate = dataclasses.replace(study[0], objectives={"accuracy": 0.3})
    assert insight.first_scores([accurate])[1] == {0: -0.3}
