"""Samplers by name: each stays in the space, draws nothing twice, resumes, and finds an optimum sooner than chance."""

import itertools
import json
import random
import statistics

import optuna
import pytest

from hybridnas.errors import ConfigError
from hybridnas.search.config import SAMPLERS
from hybridnas.search.sampling import samplers
from hybridnas.search.sampling.distinct import DRAWN, Fixed, Fresh, Naming, ask
from hybridnas.search.sampling.evolution import Evolution
from hybridnas.search.sampling.samplers import make_pruner, make_sampler
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.tabular.simulate import Ladder, Limits, simulate

SCALE = Scale(d_model=16, depth=4, multiple=1, n_experts=2)
PLAIN = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [4], "baselines": []}
CONDITIONAL = {
    **{"name": "conditional", "letters": ["M", "F", "[M,F]"], "motif_length": [1, 2, 4], "baselines": []},
    **{"M.d_state": [2, 4, 8], "split": {"low": 0.3, "high": 0.7, "step": 0.1}},
}
DRAWING = [name for name in SAMPLERS if name != "bruteforce"]


@pytest.fixture(scope="module")
def plain():
    return Naming(Space.from_mapping(PLAIN), SCALE)


@pytest.fixture(scope="module")
def conditional():
    return Naming(Space.from_mapping(CONDITIONAL), SCALE)


def landscape(naming, seed=0, noise=0.3):
    """Return scores that add up over places and pairs of neighbours, noisier at earlier rungs."""
    rng = random.Random(seed)
    place = [{letter: rng.gauss(0, 1) for letter in "MAF"} for _ in range(4)]
    pair = {two: rng.gauss(0, 0.5) for two in itertools.product("MAF", repeat=2)}
    scores = {}
    for motif in itertools.product("MAF", repeat=4):
        name = naming({f"slot{i}": letter for i, letter in enumerate(motif)})
        final = sum(place[i][letter] for i, letter in enumerate(motif)) + sum(map(pair.get, itertools.pairwise(motif)))
        if not name.startswith("infeasible"):
            scores[name] = {rung: final + rng.gauss(0, noise) * (900 - rung) / 900 for rung in (100, 300, 900)}
    return scores


LADDER = Ladder((100, 300, 900), 3)
WHOLE = Limits(most=1e9)


def courses(naming, name, repeats=7, pruner="none"):
    scores = landscape(naming)
    return [simulate(scores, naming, LADDER, name, pruner, seed=seed, limits=WHOLE) for seed in range(repeats)]


@pytest.mark.parametrize("name", [name for name in DRAWING if name not in ("random", "gp")])
def test_a_sampler_finds_the_optimum_of_a_table_sooner_than_random(plain, name):
    best = min(curve[900] for curve in landscape(plain).values())
    # TPE's searches end early or very late: a median of seven says little
    ours = statistics.median(one.tokens_to(best) for one in courses(plain, name, repeats=21))
    assert ours < 0.8 * statistics.median(one.tokens_to(best) for one in courses(plain, "random", repeats=21))


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
            simulate(scores, plain, LADDER, name, "halving", seed=seed, limits=Limits(most=20_000))
            for seed in (3, 3, 4)
        )
        assert one == same
        assert one.found != other.found


def test_a_promotion_costs_the_tokens_between_the_rungs(plain):
    name = next(iter(landscape(plain)))
    alone = simulate({name: {100: 1.0, 300: 1.0, 900: 1.0}}, plain, LADDER, "random", "none", seed=0, limits=WHOLE)
    assert (alone.trials, alone.tokens, alone.found) == (1, 900, [(1, 900, 1.0)])
    scores = {name: {100: float(i), 300: float(i), 900: float(i)} for i, name in enumerate(landscape(plain))}
    course = simulate(scores, plain, LADDER, "random", "halving", seed=1, limits=WHOLE)
    full = [tokens for _, tokens, _ in course.found]
    reached = {100: course.trials, 900: len(full)}
    assert course.tokens == 100 * reached[100] + 200 * _at(course, 300) + 600 * reached[900]


def _at(course, rung):
    rest = course.tokens - 100 * course.trials - 600 * len(course.found)
    assert rest % 200 == 0
    return rest // 200


def asked(study, naming, count, score=None):
    """Ask for candidates, tell them scores, and return their choices."""
    found = []
    for _ in range(count):
        trial = study.ask()
        naming.space.choose(trial, naming.scale)
        trial.set_user_attr("fingerprint", naming(trial.params))
        study.tell(trial, score(trial.params) if score else float(len(found)))
        found.append(dict(trial.params))
    return found


def study_of(name, naming, seed=0, **rest):
    return optuna.create_study(sampler=make_sampler(name, seed, naming.space, naming.scale, naming), **rest)


@pytest.mark.parametrize("name", DRAWING)
def test_draws_stay_in_a_conditional_space_and_none_comes_twice(conditional, name):
    study = study_of(name, conditional)
    found = asked(study, conditional, 16 if name == "gp" else 30)
    names = [conditional(params) for params in found]
    assert len(set(names)) == len(names)
    for params in found:
        assert {"motif_length", "slot0"} <= set(params)
        slots = [key for key in params if key.startswith("slot")]
        assert len(slots) == params["motif_length"]
        letters = "".join(params[slot] for slot in slots)
        assert ("M.d_state" in params) == ("M" in letters)
        proposal = conditional.space.propose(Fixed(params), SCALE) if not names[0].startswith("inf") else None
        assert proposal is None or proposal.arch.fingerprint() == conditional(params)


@pytest.mark.parametrize("name", DRAWING)
def test_a_sampler_works_beside_baselines_that_have_no_choices(plain, name):
    study = study_of(name, plain)
    for preset in ("moe_mamba", "mamba"):
        study.enqueue_trial({}, user_attrs={"baseline": preset})
    for number in range(2):
        trial = study.ask()
        assert trial.params == {}
        trial.set_user_attr("fingerprint", plain({f"slot{i}": "MF"[number] for i in range(4)}))
        study.tell(trial, 1.0)
    found = asked(study, plain, 24)
    assert all(len(params) == 4 for params in found)
    motifs = {"".join(params.values()) for params in found}
    assert len(motifs) == 24
    assert not {"MMMM", "FFFF"} & motifs  # what the baselines were


@pytest.mark.parametrize("name", DRAWING)
def test_another_process_goes_on_with_a_study(plain, name, tmp_path):
    def opened(seed):
        journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "journal.log"))
        return study_of(
            name, plain, seed, storage=optuna.storages.JournalStorage(journal), study_name="s", load_if_exists=True
        )

    first = asked(opened(0), plain, 18)
    second = asked(opened(1), plain, 6)
    motifs = ["".join(params.values()) for params in first + second]
    assert len(set(motifs)) == 24


def test_two_workers_never_hold_the_same_candidate(plain):
    studies = [study_of("evolution", plain, seed=0)]
    studies.append(
        optuna.load_study(
            study_name=studies[0].study_name,
            storage=studies[0]._storage,
            sampler=make_sampler("evolution", 0, plain.space, SCALE, plain),
        )
    )
    names = []
    for number in range(30):
        trial = ask(studies[number % 2])  # the same seed in both: each would draw what the other does
        names.append(studies[0].get_trials()[number].system_attrs[DRAWN])
        plain.space.choose(trial, SCALE)
        if number >= 4:  # four are running at any time
            studies[0].tell(number - 4, float(number))
    assert len(set(names)) == 30


def test_a_space_that_is_used_up_gives_what_it_has(plain):
    space = Space.from_mapping({**PLAIN, "letters": ["M", "F"], "motif_length": [1]})
    naming = Naming(space, SCALE)
    study = study_of("tpe", naming)
    found = [params["slot0"] for params in asked(study, naming, 4)]
    assert sorted(found[:2]) == ["F", "M"]
    assert len(found) == 4


def test_what_is_infeasible_is_not_drawn_twice(plain):
    space = Space.from_mapping({**PLAIN, "requires": ["F"], "letters": ["A", "F"], "motif_length": [2]})
    naming = Naming(space, SCALE)
    motifs = ["".join(params.values()) for params in asked(study_of("random", naming), naming, 4)]
    assert sorted(motifs) == ["AA", "AF", "FA", "FF"]
    assert naming({"slot0": "A", "slot1": "A"}).startswith("infeasible")


def test_tpe_alone_comes_back_to_what_it_likes_and_here_it_does_not(plain):
    def score(params):
        return float("".join(params.values()) != "MMMM")

    bare = optuna.create_study(sampler=samplers._inner("tpe", 0, plain.space, SCALE))
    bare.enqueue_trial({f"slot{i}": "M" for i in range(4)})
    ours = study_of("tpe", plain)
    ours.enqueue_trial({f"slot{i}": "M" for i in range(4)})
    repeats = 40 - len({json.dumps(params) for params in asked(bare, plain, 40, score)})
    assert repeats >= 5
    assert len({json.dumps(params) for params in asked(ours, plain, 40, score)}) == 40
    assert ours.sampler.redrawn >= 5


def test_evolution_breeds_other_kinds_of_spaces_too():
    space = Space.from_mapping(
        {"name": "p", "base": "M", "replace": "M", "insert": "A", "n_inserted": [0, 1, 2, 3],
         "placement": ["spread", "first", "last"], "baselines": []}
    )  # fmt: skip
    naming = Naming(space, SCALE)
    study = optuna.create_study(sampler=Fresh(Evolution(space, SCALE, 0, population=3), naming, 0))
    found = asked(study, naming, 8)
    assert len({naming(params) for params in found}) == 8


def test_evolution_looks_for_one_objective():
    space = Space.from_mapping(PLAIN)
    study = study_of("evolution", Naming(space, SCALE), directions=["minimize", "minimize"])
    with pytest.raises(ConfigError, match="sampler=evolution looks for one objective; with several take nsga2 or tpe"):
        ask(study)  # at the first draw already, not after a population


# Names


def test_an_unknown_sampler_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match="search sampler='evolutoin' is unknown; did you mean 'evolution'"):
        make_sampler("evolutoin", 0, Space.from_mapping(PLAIN), SCALE)


def test_gp_without_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="sampler='gp' needs scipy: pip install scipy, or choose sampler=tpe"):
        make_sampler("gp", 0, Space.from_mapping(PLAIN), SCALE)


def test_pruners_by_name():
    assert isinstance(make_pruner("hyperband", (1, 3, 9)), optuna.pruners.HyperbandPruner)
    for name in ("none", "halving"):
        assert isinstance(make_pruner(name, (1, 3, 9)), optuna.pruners.NopPruner)
    assert isinstance(make_pruner("hyperband", (9,)), optuna.pruners.NopPruner)


def test_a_search_that_has_found_enough_ends_before_it_has_found_the_best(plain):
    scores = landscape(plain)
    good = sorted(curve[900] for curve in scores.values())[3]
    whole = simulate(scores, plain, LADDER, "random", "none", seed=0, limits=WHOLE)
    limits = Limits(most=1e9, enough=3000, target=good)
    short = simulate(scores, plain, LADDER, "random", "none", seed=0, limits=limits)
    assert whole.best_at() == min(curve[900] for curve in scores.values())
    assert short.found == whole.found[: len(short.found)]
    assert short.tokens == max(short.tokens_to(good), 3600)  # four full trainings of 900 are the first to pass 3,000
