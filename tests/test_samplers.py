"""Samplers by name: each stays in the space, draws nothing twice, resumes, and finds an optimum sooner than chance."""

import itertools
import json
import random
import statistics

import optuna
import pytest

from hybridnas.errors import ConfigError
from hybridnas.search import samplers
from hybridnas.search.config import SAMPLERS
from hybridnas.search.drawing import DRAWN, Fixed, Fresh, Naming, ask
from hybridnas.search.evolution import Evolution, Member, Motifs, members_of
from hybridnas.search.samplers import make_pruner, make_sampler
from hybridnas.search.simulate import Ladder, Limits, simulate
from hybridnas.search_spaces.space import Scale, Space

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


# Ageing evolution


def told(study, params, distributions, curve, *, complete=True, **attributes):
    """Add a trial with this curve."""
    state = optuna.trial.TrialState.COMPLETE if complete else optuna.trial.TrialState.PRUNED
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            value=list(curve.values())[-1] if complete else None,
            params=params,
            distributions=distributions,
            intermediate_values=curve,
            user_attrs=attributes,
        )
    )


def slots(motif):
    params = {f"slot{i}": letter for i, letter in enumerate(motif)}
    return params, {name: optuna.distributions.CategoricalDistribution(["M", "A", "F"]) for name in params}


def test_members_meet_at_the_highest_rung_that_both_have_reached():
    done = Member(0, {}, {}, {100: 5.0, 300: 3.0})
    stopped = Member(1, {}, {}, {100: 4.0})
    late = Member(2, {}, {}, {100: 9.0, 300: 2.0})
    assert stopped.beats(done)  # at 100 tokens; its 4.0 is not held against the 3.0 of 300
    assert not done.beats(stopped)
    assert late.beats(done)
    assert stopped.beats(late)
    assert Member(0, {}, {}, {100: 4.0}).beats(stopped)  # of equals, the older


def test_what_paused_and_went_on_is_one_member_and_what_has_no_choices_is_none():
    study = optuna.create_study()
    told(study, {}, {}, {100: 0.1}, baseline="mamba")
    told(study, *slots("MM"), {100: 2.0}, complete=False)
    told(study, *slots("AA"), {100: 3.0, 300: 1.0})
    told(study, *slots("MM"), {100: 2.0, 300: 1.5}, continues=1)
    told(study, *slots("AA"), {100: 3.0, 300: 1.0}, duplicate_of=2)
    told(study, *slots("FF"), {}, complete=False)  # infeasible: told as pruned, without any score
    members = members_of(study)
    assert [(member.number, dict(member.scores)) for member in members] == [
        (1, {100: 2.0, 300: 1.5}),
        (2, {100: 3.0, 300: 1.0}),
    ]


def test_the_population_is_the_youngest_and_parents_win_their_tournaments():
    """The oracle: age out by hand, replay the same draws of the generator, and name the winners."""
    space = Space.from_mapping({**PLAIN, "motif_length": [2]})
    study = optuna.create_study()
    losses = [0.0, 9.0, 5.0, 7.0, 6.0, 8.0]  # the best of all, number 0, is too old to take part
    motifs = ["MM", "MA", "MF", "AM", "AA", "AF"]
    for motif, loss in zip(motifs, losses, strict=True):
        told(study, *slots(motif), {100: loss})
    evolution = Evolution(space, SCALE, seed=7, population=4, tournament=2, crossover=0.0)
    for _ in range(50):
        population = members_of(study)[-4:]
        assert [member.number for member in population] == [2, 3, 4, 5]
        twin = random.Random()
        twin.setstate(evolution.rng.getstate())
        drawn = twin.sample([2, 3, 4, 5], 2)
        expected = min(drawn, key=lambda number: losses[number])
        assert evolution.winner(population).number == expected
    drawn = [evolution.child(population) for _ in range(200)]
    children = {child["slot0"] + child["slot1"] for child in drawn}
    # One move from MF, AM or AA, the winners of some tournament of two; AF loses them all.
    allowed = {
        "".join(child)
        for parent in ("MF", "AM", "AA")
        for child in itertools.product("MAF", repeat=2)
        if "".join(child) != parent
        and (sum(a != b for a, b in zip(parent, child, strict=True)) == 1 or "".join(child) == parent[::-1])
    }
    assert children <= allowed
    assert len(children) > 5


def test_a_hand_simulated_run_of_ageing_evolution_is_met_to_the_letter(plain):
    """Real et al.'s algorithm 1, written out here with the same generator: the same children in the same order."""
    space = Space.from_mapping({**PLAIN, "motif_length": [3]})
    naming = Naming(space, Scale(d_model=16, depth=3, multiple=1))

    def loss(motif):
        return sum((i + 1) * "MAF".index(letter) for i, letter in enumerate(motif))

    study = optuna.create_study()
    first = ["FFF", "FAF", "AFF", "FFA", "AAF"]
    for motif in first:
        told(study, *slots(motif), {100: float(loss(motif))})
    ours = Evolution(space, naming.scale, seed=11, population=5, tournament=3, crossover=0.0)
    oracle, queue = random.Random(11), list(enumerate(first))
    motifs = Motifs(space, naming.scale)
    for number in range(5, 25):
        child = ours.sample_relative(study, None, {})
        ours_motif = "".join(child[f"slot{i}"] for i in range(3))
        sample = oracle.sample(queue[-5:], 3)
        parent = min(sample, key=lambda entry: (loss(entry[1]), entry[0]))[1]
        oracle.random()  # whether to cross
        oracle.choice([0] * 3)  # which gene: each is a slot of the motif
        expected = "".join(motifs.neighbour(list(parent), oracle))
        assert ours_motif == expected
        queue.append((number, expected))
        told(study, *slots(expected), {100: float(loss(expected))})
    assert min(loss(motif) for _, motif in queue) < min(map(loss, first))


def test_moves_reach_every_allowed_length_and_no_other():
    space = Space.from_mapping({**PLAIN, "motif_length": [2, 4], "letters": ["M", "[M,F]"]})
    motifs, rng = Motifs(space, SCALE), random.Random(0)
    from_two = {tuple(motifs.neighbour(["M", "[M,F]"], rng)) for _ in range(300)}
    assert {len(motif) for motif in from_two} == {2, 4}
    assert ("M", "[M,F]", "M", "[M,F]") in from_two  # repeated: the same architecture, open to finer moves
    assert {len(motifs.neighbour(["M"] * 4, rng)) for _ in range(100)} == {2, 4}
    steps = Motifs(Space.from_mapping({**PLAIN, "motif_length": [2, 3]}), SCALE)
    assert {len(steps.neighbour(["M", "A"], rng)) for _ in range(200)} == {2, 3}


def test_a_crossed_child_has_its_motif_from_both_and_its_other_choices_from_either():
    space = Space.from_mapping(CONDITIONAL)
    evolution = Evolution(space, SCALE, seed=0)
    one = {"motif_length": 4, **{f"slot{i}": "M" for i in range(4)}, "M.d_state": 2, "split": 0.3}
    other = {"motif_length": 2, "slot0": "F", "slot1": "F", "split": 0.7}
    children = [evolution.cross(one, other) for _ in range(200)]
    motifs = {"".join(child[f"slot{i}"] for i in range(child["motif_length"])) for child in children}
    assert motifs == {"FFFF", "MFFF", "MMFF", "MMMF", "MMMM"}
    assert {child["split"] for child in children} == {0.3, 0.7}
    assert {child["M.d_state"] for child in children} == {2}


def test_numbers_step_to_their_neighbours_and_names_to_any_other():
    evolution = Evolution(Space.from_mapping(CONDITIONAL), SCALE, seed=0)
    share = optuna.distributions.FloatDistribution(0.3, 0.7, step=0.1)
    assert {evolution.step(0.5, share) for _ in range(60)} == {0.4, 0.6}
    assert {evolution.step(0.3, share) for _ in range(60)} == {0.4}
    sizes = optuna.distributions.CategoricalDistribution([2, 4, 8, 16])
    assert {evolution.step(4, sizes) for _ in range(60)} == {2, 8}
    where = optuna.distributions.CategoricalDistribution(["first", "middle", "last"])
    assert {evolution.step("first", where) for _ in range(60)} == {"middle", "last"}


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
