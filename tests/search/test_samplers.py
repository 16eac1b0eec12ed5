"""Samplers by name: each stays in the space, draws nothing twice, resumes, and finds an optimum sooner than chance."""

import itertools
import json
import random
import statistics

import optuna
import pytest

from hybridnas.errors import ConfigError
from hybridnas.search.config import SAMPLERS
from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.search.sampling import optuna_samplers
from hybridnas.search.sampling.candidates import Candidates
from hybridnas.search.sampling.optuna_view import hyperband, quiet
from hybridnas.search.sampling.uniform import evenly
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.study.records import TrialRecord
from hybridnas.tabular.simulate import Limits, simulate

SCALE = Scale(d_model=16, depth=4, multiple=1, n_experts=2)
PLAIN = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [4], "baselines": []}
CONDITIONAL = {
    **{"name": "conditional", "letters": ["M", "F", "[M,F]"], "motif_length": [1, 2, 4], "baselines": []},
    **{"M.d_state": [2, 4, 8], "split": {"low": 0.3, "high": 0.7, "step": 0.1}},
}
DRAWING = [name for name in SAMPLERS if name != "bruteforce"]


@pytest.fixture(scope="module")
def plain():
    return Candidates(Space.from_mapping(PLAIN), SCALE)


@pytest.fixture(scope="module")
def conditional():
    return Candidates(Space.from_mapping(CONDITIONAL), SCALE)


def landscape(candidates, seed=0, noise=0.3):
    """Return scores that add up over places and pairs of neighbours, noisier at earlier rungs."""
    rng = random.Random(seed)
    place = [{letter: rng.gauss(0, 1) for letter in "MAF"} for _ in range(4)]
    pair = {two: rng.gauss(0, 0.5) for two in itertools.product("MAF", repeat=2)}
    scores = {}
    for motif in itertools.product("MAF", repeat=4):
        name = candidates.of({f"slot{i}": letter for i, letter in enumerate(motif)}).key
        final = sum(place[i][letter] for i, letter in enumerate(motif)) + sum(map(pair.get, itertools.pairwise(motif)))
        if not name.startswith("infeasible"):
            scores[name] = {rung: final + rng.gauss(0, noise) * (900 - rung) / 900 for rung in (100, 300, 900)}
    return scores


RUNGS = {"rungs": (100, 300, 900), "reduction": 3}
WHOLE = Limits(most=1e9)


def courses(candidates, name, repeats=7, pruner="none"):
    scores = landscape(candidates)
    return [simulate(scores, candidates, name, pruner, seed=seed, limits=WHOLE, **RUNGS) for seed in range(repeats)]


@pytest.mark.parametrize("name", [name for name in DRAWING if name not in ("random", "gp")])
def test_a_sampler_finds_the_optimum_of_a_table_sooner_than_random(plain, name):
    scores = landscape(plain)
    best = min(curve[900] for curve in scores.values())
    by_chance = 900 * (len(scores) + 1) / 2  # mean tokens of drawing without replacement
    ours = statistics.mean(one.tokens_to(best) for one in courses(plain, name, repeats=24))
    assert ours < 0.8 * by_chance


def test_gp_finds_the_optimum_of_a_table_sooner_than_random(plain):
    best = min(curve[900] for curve in landscape(plain).values())
    ours = statistics.median(one.tokens_to(best) for one in courses(plain, "gp", repeats=2))
    assert ours < statistics.median(one.tokens_to(best) for one in courses(plain, "random"))


def test_halving_spends_fewer_tokens_than_training_all_to_the_end(plain):
    best = min(curve[900] for curve in landscape(plain).values())
    halving, none = (
        statistics.median(one.tokens_to(best) for one in courses(plain, "random", pruner=pruner))
        for pruner in ("halving", "none")
    )
    assert halving < none


def test_the_same_seed_is_the_same_search_and_another_is_another(plain):
    scores = landscape(plain)
    for name in ("tpe", "evolution", "nsga2", "random"):
        one, same, other = (
            simulate(scores, plain, name, "halving", seed=seed, limits=Limits(most=20_000), **RUNGS)
            for seed in (3, 3, 4)
        )
        assert one == same
        assert one.found != other.found


def test_a_promotion_costs_the_tokens_between_the_rungs(plain):
    name = next(iter(landscape(plain)))
    alone = simulate({name: {100: 1.0, 300: 1.0, 900: 1.0}}, plain, "random", "none", seed=0, limits=WHOLE, **RUNGS)
    assert (alone.trials, alone.tokens, alone.found) == (1, 900, [(1, 900, 1.0)])
    scores = {name: {100: float(i), 300: float(i), 900: float(i)} for i, name in enumerate(landscape(plain))}
    course = simulate(scores, plain, "random", "halving", seed=1, limits=WHOLE, **RUNGS)
    full = [tokens for _, tokens, _ in course.found]
    reached = {100: course.trials, 900: len(full)}
    assert course.tokens == 100 * reached[100] + 200 * _at(course, 300) + 600 * reached[900]


def _at(course, rung):
    rest = course.tokens - 100 * course.trials - 600 * len(course.found)
    assert rest % 200 == 0
    return rest // 200


def plan_of(name, candidates, seed=0, **rest):
    given = {"rungs": (1,), "reduction": 2, "n_trials": 10**6, "pruner": "none", **rest}
    return Plan(candidates=candidates, sampler=name, seed=seed, **given)


def drawn(plan, count, score=None, history=None):
    """Draw candidates one after another, record each with a score, and return their choices."""
    history = History(plan.objectives, plan.rungs) if history is None else history
    found = []
    for _ in range(count):
        number = len(history)
        draw = plan.draws.draw(history, number)
        candidate = draw.candidate
        loss = score(candidate.params) if score else float(number)
        history.put(
            TrialRecord(
                number=number,
                state="INFEASIBLE" if candidate.arch is None else "COMPLETE",
                fingerprint=candidate.fingerprint,
                choices=candidate.choices,
                cost=candidate.cost,
                rungs=[[1, loss]],
                objectives={"val_loss": loss},
                marks=draw.marks,
            )
        )
        found.append(dict(candidate.params))
    return found


def motifs_of(found):
    return ["".join(params[f"slot{i}"] for i in range(4)) for params in found]


@pytest.mark.parametrize("name", DRAWING)
def test_draws_stay_in_a_conditional_space_and_none_comes_twice(conditional, name):
    found = drawn(plan_of(name, conditional), 16 if name == "gp" else 30)
    names = [conditional.of(params).key for params in found]
    assert len(set(names)) == len(names)
    for params in found:
        assert {"motif_length", "slot0"} <= set(params)
        slots = [key for key in params if key.startswith("slot")]
        assert len(slots) == params["motif_length"]
        letters = "".join(params[slot] for slot in slots)
        assert ("M.d_state" in params) == ("M" in letters)
        assert conditional.drawn(conditional.of(params).choices).params == params  # what a record gives back


@pytest.mark.parametrize("name", DRAWING)
def test_a_sampler_works_beside_presets_that_have_no_choices(plain, name):
    plan = plan_of(name, plain)
    history = History(plan.objectives, plan.rungs)
    for number, (preset, motif) in enumerate((("moe_mamba", "MMMM"), ("mamba", "FFFF"))):
        same = plain.of({f"slot{i}": letter for i, letter in enumerate(motif)})
        history.put(
            TrialRecord(
                number=number,
                state="COMPLETE",
                preset=preset,
                fingerprint=same.fingerprint or same.key,
                rungs=[[1, 1.0]],
                objectives={"val_loss": 1.0},
            )
        )
    motifs = motifs_of(drawn(plan, 24, history=history))
    assert len(set(motifs)) == 24
    assert "MMMM" not in motifs or not plain.of({f"slot{i}": "M" for i in range(4)}).fingerprint


@pytest.mark.parametrize("name", DRAWING)
def test_a_draw_is_a_function_of_seed_number_and_records(plain, name):
    """So a search that was killed goes on as it would have: a new process draws what the old one would have drawn."""
    count = 12 if name == "gp" else 24
    whole = drawn(plan_of(name, plain, seed=5), count)
    history = History(("val_loss",), (1,))
    first = drawn(plan_of(name, plain, seed=5), count // 2, history=history)
    again = History(("val_loss",), (1,))
    for record in history.ordered():
        again.put(TrialRecord.from_dict(json.loads(json.dumps(record.to_dict()))))  # as it lies on a disk
    rest = drawn(plan_of(name, plain, seed=5), count - count // 2, history=again)
    assert first + rest == whole
    assert len(set(motifs_of(whole))) == count
    assert drawn(plan_of(name, plain, seed=6), count) != whole


def test_two_workers_never_hold_the_same_candidate(plain):
    history = History(("val_loss",), (1,))
    plans = [plan_of("evolution", plain, seed=0), plan_of("evolution", plain, seed=0)]
    running = []
    for number in range(30):
        candidate = plans[number % 2].draws.draw(history, number).candidate
        record = TrialRecord(
            number=number, state="RUNNING", fingerprint=candidate.fingerprint, choices=candidate.choices
        )
        running.append(candidate.key)
        if candidate.arch is None:
            record = TrialRecord(number=number, state="INFEASIBLE", choices=candidate.choices)
        history.put(record)
    assert len(set(running)) == 30


def test_a_space_that_is_used_up_gives_what_it_has(plain):
    space = Space.from_mapping({**PLAIN, "letters": ["M", "F"], "motif_length": [1]})
    found = [params["slot0"] for params in drawn(plan_of("tpe", Candidates(space, SCALE)), 4)]
    assert sorted(found[:2]) == ["F", "M"]
    assert len(found) == 4


def test_what_is_infeasible_is_never_drawn(plain):
    space = Space.from_mapping({**PLAIN, "requires": ["F"], "letters": ["A", "F"], "motif_length": [2]})
    candidates = Candidates(space, SCALE)
    plan = plan_of("random", candidates)
    history = History(plan.objectives, plan.rungs)
    motifs = ["".join(params.values()) for params in drawn(plan, 3, history=history)]
    assert sorted(motifs) == ["AF", "FA", "FF"]
    assert candidates.of({"slot0": "A", "slot1": "A"}).breaks == "requires"
    assert plan.draws.draw(history, 3) is None


def test_brute_force_passes_by_what_breaks_a_limit():
    space = Space.from_mapping({**PLAIN, "letters": ["A", "F"], "motif_length": [1]})
    candidates = Candidates(space, SCALE, limits={"max_state_bytes": 10_000.0}, state_length=4096)
    draw = plan_of("bruteforce", candidates).draws.draw(History(("val_loss",), (1,)), 0)
    assert (draw.candidate.pattern, draw.refused) == ("Fx4", {"max_state_bytes": 1})


@pytest.mark.parametrize("name", DRAWING)
def test_a_draw_that_passes_a_limit_is_drawn_again_and_counted(name):
    space = Space.from_mapping(PLAIN)
    candidates = Candidates(space, SCALE, limits={"max_state_bytes": 10_000.0}, state_length=4096)
    plan = plan_of(name, candidates)
    draws = [plan.draws.draw(History(plan.objectives, plan.rungs), number) for number in range(12)]
    assert all(draw.candidate.arch.cost(4096).state_bytes <= 10_000 for draw in draws)
    assert sum(draw.refused.get("max_state_bytes", 0) for draw in draws) > 0
    assert all(sum(draw.refused.values()) <= draw.redrawn for draw in draws)
    assert "A" in str(candidates.preset("transformer").arch.pattern)  # a baseline keeps its architecture


def test_tpe_alone_comes_back_to_what_it_likes_and_here_it_does_not(plain):
    def score(params):
        return float("".join(params.values()) != "MMMM")

    with quiet():
        bare = optuna.create_study(sampler=optuna_samplers._inner("tpe", 0))
    bare.enqueue_trial({f"slot{i}": "M" for i in range(4)})
    asked = []
    for _ in range(40):
        trial = bare.ask()
        plain.space.choose(trial, plain.scale)
        bare.tell(trial, score(trial.params))
        asked.append(json.dumps(trial.params))
    assert 40 - len(set(asked)) >= 5
    assert len(set(motifs_of(drawn(plan_of("tpe", plain), 40, score)))) == 40


def test_evolution_breeds_other_kinds_of_spaces_too():
    space = Space.from_mapping(
        {"name": "p", "base": "M", "replace": "M", "insert": "A", "n_inserted": [0, 1, 2, 3],
         "placement": ["spread", "first", "last"], "baselines": []}
    )  # fmt: skip
    candidates = Candidates(space, SCALE)
    found = drawn(plan_of("evolution", candidates), 8)
    assert len({candidates.of(params).key for params in found}) == 8


def test_evolution_looks_for_one_objective(plain):
    with pytest.raises(ConfigError) as caught:
        _ = plan_of("evolution", plain, objectives=("val_loss", "params")).draws
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("sampler", "evolution", ("nsga2", "tpe"))


def test_brute_force_draws_everything_once_in_order(plain):
    space = Space.from_mapping({**PLAIN, "letters": ["M", "F"], "motif_length": [2]})
    candidates = Candidates(space, SCALE)
    plan = plan_of("bruteforce", candidates)
    history = History(("val_loss",), (1,))
    found = drawn(plan, 3, history=history)
    assert ["".join(params.values()) for params in found] == ["MM", "MF", "FM"]
    anew = plan_of("bruteforce", candidates)  # another process
    assert ["".join(params.values()) for params in drawn(anew, 1, history=history)] == ["FF"]
    assert anew.draws.draw(history, 4) is None


# Names


def test_an_unknown_sampler_is_met_with_the_nearest(plain):
    with pytest.raises(ConfigError, match="did you mean 'evolution'") as caught:
        _ = plan_of("evolutoin", plain).draws
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("sampler", "evolutoin", SAMPLERS)


def test_gp_without_scipy_says_what_to_install(plain, monkeypatch):
    monkeypatch.setattr(optuna_samplers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        _ = plan_of("gp", plain).draws
    assert (caught.value.field, caught.value.got) == ("sampler", "gp")


def test_hyperband_needs_two_rungs():
    assert isinstance(hyperband((1, 3, 9)), optuna.pruners.HyperbandPruner)
    assert hyperband((9,)) is None


def test_a_diverged_row_is_passed_by(plain):
    """Best at both lower rungs, then without a last score: it fails once, and the search ends with all tried."""
    scores = {name: dict(curve) for name, curve in landscape(plain).items()}
    worst = min(scores, key=lambda name: scores[name][300])
    scores[worst].pop(900)
    course = simulate(scores, plain, "random", "halving", seed=0, limits=WHOLE, **RUNGS)
    failed = [record for record in course.records if record.state == "FAIL"]
    assert {record.fingerprint for record in failed} <= {worst}
    assert len({record.fingerprint for record in course.records if record.state == "FAIL"}) == len(failed) <= 1
    full = [curve[900] for curve in scores.values() if 900 in curve]
    assert course.best_at() == min(full)


def test_a_search_that_has_found_enough_ends_before_it_has_found_the_best(plain):
    scores = landscape(plain)
    good = sorted(curve[900] for curve in scores.values())[3]
    whole = simulate(scores, plain, "random", "none", seed=0, limits=WHOLE, **RUNGS)
    limits = Limits(most=1e9, enough=3000, target=good)
    short = simulate(scores, plain, "random", "none", seed=0, limits=limits, **RUNGS)
    assert whole.best_at() == min(curve[900] for curve in scores.values())
    assert short.found == whole.found[: len(short.found)]
    assert short.tokens == max(short.tokens_to(good), 3600)  # four full trainings of 900 are the first to pass 3,000


@pytest.mark.parametrize("name", DRAWING)
def test_a_draw_that_breaks_a_rule_of_the_space_is_drawn_again(name):
    space = Space.from_mapping({**PLAIN, "letters": ["M", "N", "A", "F"], "min_attention": 1, "max_mixers": 1})
    candidates = Candidates(space, Scale(d_model=32, depth=4, multiple=2, seq_len=64))
    broken = [candidates.of(evenly(candidates, random.Random(n)).params).arch is None for n in range(100)]
    assert 0.4 < sum(broken) / 100 < 0.9
    plan = plan_of(name, candidates)
    draws = [plan.draws.draw(History(plan.objectives, plan.rungs), number) for number in range(20)]
    assert all(draw.candidate.arch is not None for draw in draws)
    assert sum(draw.redrawn for draw in draws) > 0
