"""Ageing evolution against what it should do by hand: members, tournaments, moves and crossing."""

import itertools
import random

from hybridnas.search.history import History
from hybridnas.search.sampling.candidates import Candidates, Parameter
from hybridnas.search.sampling.evolution import Evolution, Member, Motifs
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.study.records import TrialRecord

SCALE = Scale(d_model=16, depth=4, multiple=1, n_experts=2)
PLAIN = {"name": "plain", "letters": ["M", "A", "F"], "motif_length": [4], "baselines": []}
CONDITIONAL = {
    **{"name": "conditional", "letters": ["M", "F", "[M,F]"], "motif_length": [1, 2, 4], "baselines": []},
    **{"M.d_state": [2, 4, 8], "split": {"low": 0.3, "high": 0.7, "step": 0.1}},
}


def slots(motif):
    return {f"slot{i}": letter for i, letter in enumerate(motif)}


def recorded(history, number, choices, curve, state="PRUNED", **fields):
    """Put a trial with this curve into the history."""
    entries = [{"tokens": tokens, "valid_loss": loss} for tokens, loss in curve.items()]
    objectives = {"val_loss": list(curve.values())[-1]} if curve else {}
    record = TrialRecord(number=number, state=state, choices=choices, curve=entries, objectives=objectives, **fields)
    history.put(record)


def test_members_meet_at_the_highest_rung_that_both_have_reached():
    done = Member(0, {}, {}, {100: 5.0, 300: 3.0})
    stopped = Member(1, {}, {}, {100: 4.0})
    late = Member(2, {}, {}, {100: 9.0, 300: 2.0})
    assert stopped.beats(done)  # at 100 tokens; its 4.0 is not held against the 3.0 of 300
    assert not done.beats(stopped)
    assert late.beats(done)
    assert stopped.beats(late)
    assert Member(0, {}, {}, {100: 4.0}).beats(stopped)  # of equals, the older


def test_members_are_what_has_choices_and_a_score_and_no_duplicate_or_preset():
    space = Space.from_mapping({**PLAIN, "motif_length": [2]})
    history = History(("val_loss",), (100, 300))
    recorded(history, 0, {}, {100: 0.1, 300: 0.1}, state="COMPLETE", preset="mamba")
    recorded(history, 1, slots("MM"), {100: 2.0, 200: 1.9, 300: 1.5}, state="COMPLETE")  # 200 is no rung
    recorded(history, 2, slots("AA"), {100: 3.0, 300: 1.0}, state="COMPLETE")
    recorded(history, 3, slots("AA"), {100: 3.0, 300: 1.0}, state="DUPLICATE", duplicate_of=2)
    recorded(history, 4, slots("FF"), {}, state="INFEASIBLE")
    recorded(history, 5, slots("FM"), {100: 4.0}, state="RUNNING")  # trains for the first time
    recorded(history, 6, slots("MF"), {100: 5.0}, state="RUNNING", rungs=[[100, 5.0]])  # was paused and goes on
    recorded(history, 7, slots("AF"), {100: 5.0}, state="FAIL")
    members = Evolution(Candidates(space, SCALE), seed=0).members(history)
    assert [(member.number, dict(member.scores)) for member in members] == [
        (1, {100: 2.0, 300: 1.5}),
        (2, {100: 3.0, 300: 1.0}),
        (6, {100: 5.0}),
    ]


def test_the_population_is_the_youngest_and_parents_win_their_tournaments():
    """The oracle: age out by hand, replay the same draws of the generator, and name the winners."""
    space = Space.from_mapping({**PLAIN, "motif_length": [2]})
    history = History(("val_loss",), (100,))
    losses = [0.0, 9.0, 5.0, 7.0, 6.0, 8.0]  # the best of all, number 0, is too old to take part
    motifs = ["MM", "MA", "MF", "AM", "AA", "AF"]
    for number, (motif, loss) in enumerate(zip(motifs, losses, strict=True)):
        recorded(history, number, slots(motif), {100: loss}, state="COMPLETE")
    evolution = Evolution(Candidates(space, SCALE), seed=7, population=4, tournament=2, crossover=0.0)
    for _ in range(50):
        population = evolution.members(history)
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


def test_a_hand_simulated_run_of_ageing_evolution_is_met_to_the_letter():
    """Real et al.'s algorithm 1, written out here with the same generator: the same children in the same order."""
    space = Space.from_mapping({**PLAIN, "motif_length": [3]})
    candidates = Candidates(space, Scale(d_model=16, depth=3, multiple=1))

    def loss(motif):
        return sum((i + 1) * "MAF".index(letter) for i, letter in enumerate(motif))

    history = History(("val_loss",), (100,))
    first = ["FFF", "FAF", "AFF", "FFA", "AAF"]
    for number, motif in enumerate(first):
        recorded(history, number, slots(motif), {100: float(loss(motif))}, state="COMPLETE")
    ours = Evolution(candidates, seed=11, population=5, tournament=3, crossover=0.0)
    oracle, queue = random.Random(11), list(enumerate(first))
    motifs = Motifs(space, candidates.scale)
    for number in range(5, 25):
        child = ours.child(ours.members(history))
        ours_motif = "".join(child[f"slot{i}"] for i in range(3))
        sample = oracle.sample(queue[-5:], 3)
        parent = min(sample, key=lambda entry: (loss(entry[1]), entry[0]))[1]
        oracle.random()  # whether to cross
        oracle.choice([0] * 3)  # which gene: each is a slot of the motif
        expected = "".join(motifs.neighbor(list(parent), oracle))
        assert ours_motif == expected
        queue.append((number, expected))
        recorded(history, number, slots(expected), {100: float(loss(expected))}, state="COMPLETE")
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
    evolution = Evolution(Candidates(space, SCALE), seed=0)
    one = {"motif_length": 4, **{f"slot{i}": "M" for i in range(4)}, "M.d_state": 2, "split": 0.3}
    other = {"motif_length": 2, "slot0": "F", "slot1": "F", "split": 0.7}
    children = [evolution.cross(one, other) for _ in range(200)]
    motifs = {"".join(child[f"slot{i}"] for i in range(child["motif_length"])) for child in children}
    assert motifs == {"FFFF", "MFFF", "MMFF", "MMMF", "MMMM"}
    assert {child["split"] for child in children} == {0.3, 0.7}
    assert {child["M.d_state"] for child in children} == {2}


def test_numbers_step_to_their_neighbors_and_names_to_any_other():
    evolution = Evolution(Candidates(Space.from_mapping(CONDITIONAL), SCALE), seed=0)
    share = Parameter.range(0.3, 0.7, 0.1)
    assert {evolution.step(0.5, share) for _ in range(60)} == {0.4, 0.6}
    assert {evolution.step(0.3, share) for _ in range(60)} == {0.4}
    sizes = Parameter((2, 4, 8, 16))
    assert {evolution.step(4, sizes) for _ in range(60)} == {2, 8}
    where = Parameter(("first", "middle", "last"))
    assert {evolution.step("first", where) for _ in range(60)} == {"middle", "last"}
