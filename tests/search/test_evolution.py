"""Ageing evolution against what it should do by hand: members, tournaments, moves and crossing."""

import itertools
import random

import optuna
import pytest

from hybridnas.search.sampling.distinct import Naming
from hybridnas.search.sampling.evolution import Evolution, Member, Motifs, members_of
from hybridnas.search_spaces.space import Scale, Space

SCALE = Scale(d_model=16, depth=4, multiple=1, n_experts=2)
PLAIN = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [4], "baselines": []}
CONDITIONAL = {
    **{"name": "conditional", "letters": ["M", "F", "[M,F]"], "motif_length": [1, 2, 4], "baselines": []},
    **{"M.d_state": [2, 4, 8], "split": {"low": 0.3, "high": 0.7, "step": 0.1}},
}


@pytest.fixture(scope="module")
def plain():
    return Naming(Space.from_mapping(PLAIN), SCALE)


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
        expected = "".join(motifs.neighbor(list(parent), oracle))
        assert ours_motif == expected
        queue.append((number, expected))
        told(study, *slots(expected), {100: float(loss(expected))})
    assert min(loss(motif) for _, motif in queue) < min(map(loss, first))


def test_moves_reach_every_allowed_length_and_no_other():
    space = Space.from_mapping({**PLAIN, "motif_length": [2, 4], "letters": ["M", "[M,F]"]})
    motifs, rng = Motifs(space, SCALE), random.Random(0)
    from_two = {tuple(motifs.neighbor(["M", "[M,F]"], rng)) for _ in range(300)}
    assert {len(motif) for motif in from_two} == {2, 4}
    assert ("M", "[M,F]", "M", "[M,F]") in from_two  # repeated: the same architecture, open to finer moves
    assert {len(motifs.neighbor(["M"] * 4, rng)) for _ in range(100)} == {2, 4}
    steps = Motifs(Space.from_mapping({**PLAIN, "motif_length": [2, 3]}), SCALE)
    assert {len(steps.neighbor(["M", "A"], rng)) for _ in range(200)} == {2, 3}


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


def test_numbers_step_to_their_neighbors_and_names_to_any_other():
    evolution = Evolution(Space.from_mapping(CONDITIONAL), SCALE, seed=0)
    share = optuna.distributions.FloatDistribution(0.3, 0.7, step=0.1)
    assert {evolution.step(0.5, share) for _ in range(60)} == {0.4, 0.6}
    assert {evolution.step(0.3, share) for _ in range(60)} == {0.4}
    sizes = optuna.distributions.CategoricalDistribution([2, 4, 8, 16])
    assert {evolution.step(4, sizes) for _ in range(60)} == {2, 8}
    where = optuna.distributions.CategoricalDistribution(["first", "middle", "last"])
    assert {evolution.step("first", where) for _ in range(60)} == {"middle", "last"}
