"""Search spaces: what they may say, what they draw, and that every candidate meets one target."""

import random
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from hybridnas.arch.arch import Arch
from hybridnas.errors import ConfigError, MatchError, PatternError
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.fit import TOLERANCE, fit, share_free
from hybridnas.search_spaces.placement import PLACEMENTS, place
from hybridnas.search_spaces.space import BASELINES, Scale, Space, list_spaces, load_space

SCALE = Scale(d_model=32, depth=4, n_experts=4, multiple=2, seq_len=64)
SHIPPED = ("attention_placement", "hybrid", "mamba_moe", "tabular")


class Dice:
    """A Chooser of its own kind: no Optuna."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.seen = {}

    def suggest_categorical(self, name, choices):
        return self.seen.setdefault(name, self.random.choice(list(choices)))

    def suggest_float(self, name, low, high, *, step=None):
        count = int((high - low) / step + 1e-9)
        return self.seen.setdefault(name, low + step * self.random.randint(0, count))


def proposed(drawn, chooser, scale):
    """Return the proposal, or the reason for which there is none."""
    try:
        return drawn.propose(chooser, scale)
    except MatchError as error:
        return str(error)


def space(**keys):
    return Space.from_mapping({"name": "mine", **keys})


@limits(max_examples=60)
@given(seed=st.integers(0, 10**9), name=st.sampled_from(SHIPPED), depth=st.sampled_from([2, 4, 6]))
def test_every_drawn_candidate_meets_the_target_within_two_percent_or_says_why_not(seed, name, depth):
    scale = SCALE.replace(depth=depth)
    drawn = load_space(name)
    target = drawn.target(scale)
    proposal = proposed(drawn, Dice(seed), scale)
    if isinstance(proposal, str):
        assert any(words in proposal for words in ("active parameters", "requires", "no width to size")), proposal
        return
    assert abs(proposal.arch.cost().active_params - target) <= 0.02 * target
    assert len(proposal.arch.pattern) == depth
    assert proposal.arch.d_model == scale.d_model


def test_the_same_draws_give_the_same_architecture():
    drawn = load_space("mamba_moe")
    first, again = (drawn.propose(Dice(3), SCALE) for _ in range(2))
    assert first.arch.fingerprint() == again.arch.fingerprint()
    assert first.choices == again.choices


@pytest.mark.parametrize("name", SHIPPED)
def test_the_five_baselines_meet_one_target(name):
    drawn = load_space(name)
    assert drawn.baselines == BASELINES == ("moe_mamba", "mamba", "mamba_mlp", "transformer", "transformer_moe")
    target = drawn.target(SCALE)
    for preset in drawn.baselines:
        got = drawn.baseline(preset, SCALE).cost().active_params
        assert abs(got - target) <= TOLERANCE * target, preset
    assert drawn.baseline("moe_mamba", SCALE).cost().active_params == target


def test_a_target_can_be_given():
    scale = SCALE.replace(active_params=40_000)
    assert load_space("hybrid").target(scale) == 40_000
    assert abs(load_space("hybrid").baseline("mamba", scale).cost().active_params - 40_000) <= 800


def test_letters_cycle_a_motif_to_the_depth():
    one = space(letters=["M", "E"], motif_length=[2], n_experts=4)
    patterns = {str(one.propose(Dice(seed), SCALE).arch.pattern) for seed in range(40)}
    assert patterns == {"Mx4", "MEME", "EMEM", "Ex4"}


def test_a_motif_longer_than_the_depth_is_a_motif_of_the_depth():
    one = space(letters=["M"], motif_length=[2, 8])
    choices = one.propose(Dice(0), SCALE.replace(depth=3)).choices
    assert choices["motif_length"] in (2, 3)


def test_a_base_has_slots_replaced_where_the_placement_says():
    one = space(base="M", replace="M", insert="A", n_inserted=[1], placement=["last"])
    assert str(one.propose(Dice(0), SCALE).arch.pattern) == "MMMA"
    mixed = space(base="MF", replace="M", insert="A", n_inserted=[1], placement=["first"])
    assert str(mixed.propose(Dice(0), SCALE).arch.pattern) == "AFMF"


def test_more_to_insert_than_slots_is_not_drawn():
    one = space(base="M", replace="M", insert="A", n_inserted=[0, 2, 9])
    counts = {one.propose(Dice(seed), SCALE).choices["n_inserted"] for seed in range(30)}
    assert counts == {0, 2}


def test_candidates_are_a_list_of_names():
    one = space(
        candidates=[
            {"name": "pattern", "pattern": "MEME", "n_experts": 2},
            {"name": "motif", "motif": "MF"},
            {"name": "preset", "preset": "moe_mamba", "n_experts": 8, "split": 0.4},
        ]
    )
    found = {}
    for seed in range(30):
        proposal = one.propose(Dice(seed), SCALE)
        found[proposal.name] = proposal.arch
    assert {name: str(arch.pattern) for name, arch in found.items()} == {
        "pattern": "MEME",
        "motif": "MFMF",
        "preset": "MEME",
    }
    stored = {name: str(arch.to_dict()) for name, arch in found.items()}
    assert "'n_experts': 2" in stored["pattern"]
    assert "'n_experts': 8" in stored["preset"]
    assert one.size(SCALE) == 3


def test_a_space_without_matching_keeps_its_sizes():
    one = space(candidates=[{"pattern": "MF", "d_ff": 8}], match=False)
    arch = one.propose(Dice(0), SCALE).arch
    assert arch.cost() == Arch.from_pattern("MF", d_model=32, vocab_size=256, d_ff=8).cost()


def test_a_split_gives_mixers_their_share():
    def mixers(share):
        arch = space(candidates=[{"motif": "ME", "split": share, "n_experts": 4}]).propose(Dice(0), SCALE).arch
        parts = {slot.letter: slot for slot in arch.pattern.slots}
        assert set(parts) == {"M", "E"}
        return arch.replace(n_experts=1).cost().active_params, arch.cost().active_params, arch.fingerprint()

    low, high = mixers(0.3), mixers(0.7)
    assert low[2] != high[2]
    assert low[1] == pytest.approx(high[1], rel=0.04)


def test_a_range_of_whole_numbers_gives_whole_numbers():
    one = space(
        letters=["M", "E"],
        motif_length=[2],
        requires=["E"],
        **{"E.n_experts": {"low": 2, "high": 6, "step": 2}},
    )
    drawn = set()
    for seed in range(40):
        try:
            drawn.add(one.propose(Dice(seed), SCALE).choices["E.n_experts"])
        except MatchError:
            continue
    assert drawn == {2, 4, 6}
    assert all(type(value) is int for value in drawn)


def test_what_is_required_is_said():
    one = space(letters=["M", "E"], motif_length=[1], requires=["M"])
    reasons = set()
    for seed in range(20):
        try:
            one.propose(Dice(seed), SCALE)
        except MatchError as error:
            reasons.add(str(error))
    assert reasons == {"pattern 'Ex4' has no M, which space 'mine' requires"}


def test_a_pattern_without_widths_cannot_be_fitted():
    arch = Arch.from_pattern("AA", d_model=32, vocab_size=256)
    with pytest.raises(MatchError, match="no width to size"):
        fit(arch, 10_000)
    assert not share_free(arch.pattern)


def test_an_unreachable_target_is_refused():
    with pytest.raises(MatchError, match="active"):
        load_space("mamba_moe").baseline("mamba", SCALE.replace(active_params=10))


@pytest.mark.parametrize(
    ("where", "count", "slots", "wanted"),
    [
        ("spread", 1, 4, [2]),
        ("spread", 2, 8, [2, 6]),
        ("spread", 3, 6, [1, 3, 5]),
        ("first", 2, 5, [0, 1]),
        ("middle", 1, 5, [2]),
        ("middle", 2, 6, [2, 3]),
        ("last", 2, 5, [3, 4]),
        ("last", 0, 5, []),
        ("spread", 0, 5, []),
        ("spread", 9, 3, [0, 1, 2]),
    ],
)
def test_placements(where, count, slots, wanted):
    assert place(where, count, slots) == wanted


@given(where=st.sampled_from(PLACEMENTS), slots=st.integers(1, 60), count=st.integers(0, 60))
def test_a_placement_has_so_many_different_slots(where, slots, count):
    found = place(where, count, slots)
    assert len(found) == len(set(found)) == min(count, slots)
    assert all(0 <= slot < slots for slot in found)
    assert found == sorted(found)


def test_sizes_count_what_can_be_drawn():
    assert load_space("hybrid").size(SCALE) == (4**2 + 4**3 + 4**4) * 3
    assert load_space("mamba_moe").size(SCALE) == (3**2 + 3**4) * 6 * 5
    assert load_space("attention_placement").size(SCALE) == 1 + 3 * 4
    assert load_space("attention_placement").size(SCALE.replace(depth=2)) == 1 + 4 + 1


def test_enumeration_yields_every_draw_once():
    one = load_space("attention_placement")
    listed = list(every_choice(one, SCALE))
    assert len(listed) == one.size(SCALE) == len({str(choices) for choices in listed})
    ranged = space(letters=["M"], motif_length=[1], **{"M.expand": {"low": 1, "high": 2, "step": 0.6}})
    assert [choices["M.expand"] for choices in every_choice(ranged, SCALE)] == [1.0, 1.6]


def test_an_optuna_trial_is_a_chooser():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    proposal = load_space("hybrid").propose(trial, SCALE)
    assert trial.params == {k: v for k, v in proposal.choices.items() if k in trial.params}
    fixed = optuna.trial.FixedTrial(trial.params)
    assert load_space("hybrid").propose(fixed, SCALE).arch.fingerprint() == proposal.arch.fingerprint()


def test_a_space_needs_no_optuna():
    code = "import sys, hybridnas.search_spaces.space; print(sorted({'optuna', 'mlflow', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_users_space_is_found_and_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list_spaces() == sorted(SHIPPED)
    Path("search_spaces").mkdir()
    Path("search_spaces/mine.yaml").write_text("letters: [M, F]\nmotif_length: 2\n")
    Path("search_spaces/hybrid.yaml").write_text("description: ours\nletters: [M]\nmotif_length: [1]\n")
    assert list_spaces() == ["attention_placement", "hybrid", "mamba_moe", "mine", "tabular"]
    assert load_space("mine").motif_length == (2,)
    assert load_space("hybrid").description == "ours"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("letters: [M", "mine.yaml is not YAML"),
        ("", "must hold a mapping of settings, got NoneType"),
        ("- M", "got list"),
    ],
)
def test_a_file_that_is_no_space_is_named(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    Path("search_spaces").mkdir()
    Path("search_spaces/mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_space("mine")


def test_an_unknown_space_is_met_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown search space 'mamba_mo'; did you mean 'mamba_moe'\?"):
        load_space("mamba_mo")


LETTERS = {"letters": ["M", "E"], "motif_length": [2]}
BASE = {"base": "M", "replace": "M", "insert": "A", "n_inserted": [1]}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "needs exactly one of letters .* base .* and candidates, got 0"),
        ({**LETTERS, **BASE}, "got 2"),
        ({"letters": ["M"]}, r"so it needs motif_length, e.g. motif_length: \[2, 4\]"),
        ({"base": "M"}, "so it needs insert, replace and n_inserted"),
        ({**LETTERS, "n_expert": [1]}, "has no choice 'n_expert'; did you mean 'n_experts'"),
        ({**LETTERS, "E.n_expert": [1]}, "has no choice 'E.n_expert'; did you mean 'n_experts'"),
        ({**LETTERS, "Q.n_experts": [1]}, "has no choice 'Q.n_experts'"),
        ({**LETTERS, "n_experts": []}, "empty list of choices"),
        ({**LETTERS, "n_experts": [0]}, "n_experts=0 must be >= 1"),
        ({**LETTERS, "n_experts": [-4]}, "n_experts=-4 must be >= 1"),
        ({**LETTERS, "n_experts": ["8"]}, "n_experts='8' must be an integer, got str"),
        ({**LETTERS, "n_experts": [[8]]}, r"has the choice \[8\]; each must be a number"),
        ({**LETTERS, "n_experts": {"low": 1, "high": 8}}, "as a range needs low, high and step"),
        ({**LETTERS, "n_experts": {"low": 8, "high": 1, "step": 1}}, "needs low <= high and step > 0"),
        ({**LETTERS, "n_experts": {"low": "a", "high": 1, "step": 1}}, "as a range needs numbers"),
        ({**LETTERS, "split": {"low": 0.1}}, "split as a range needs low, high and step"),
        ({**LETTERS, "motif_length": [0]}, "motif_length=0 must be a whole number of 1 or more"),
        ({**LETTERS, "requires": ["Z"]}, "requires='Z' is unknown"),
        ({**LETTERS, "baselines": ["mambo"]}, "baselines='mambo' is unknown; did you mean 'mamba'"),
        ({"letters": ["M", "ME"], "motif_length": [2]}, "'ME' must be one layer"),
        ({**BASE, "placement": ["frist"]}, "placement='frist' is unknown; did you mean 'first'"),
        ({**BASE, "n_inserted": [-1]}, "n_inserted=-1 must be a whole number of 0 or more"),
        ({**BASE, "replace": "E"}, "base='M' has no 'E' to replace"),
        (
            {"candidates": [{"name": "a"}]},
            "candidate 0 must be a mapping with one of pattern, motif and preset",
        ),
        ({"candidates": ["ME"]}, "candidate 0 must be a mapping"),
        (
            {"candidates": [{"name": "a", "motif": "M"}, {"name": "a", "motif": "E"}]},
            "two candidates called 'a'",
        ),
        ({**LETTERS, "match": "maybe"}, "match='maybe' must be true or false"),
    ],
)
def test_a_mistaken_space_is_refused_in_one_sentence(keys, words):
    with pytest.raises(ConfigError, match=words) as caught:
        space(**keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [{"letters": ["M", "X"], "motif_length": [1]}, {**BASE, "insert": "X"}])
def test_unknown_letters_are_pointed_at(keys):
    with pytest.raises(PatternError, match="unknown letter 'X'"):
        space(**keys)


def test_narrowing_a_choice_keeps_the_rest():
    narrowed = Space.from_mapping({**load_mapping("mamba_moe"), "n_experts": [8, 16]})
    assert narrowed.fields["n_experts"] == [8, 16]
    assert narrowed.size(SCALE) == (3**2 + 3**4) * 2 * 5


def load_mapping(name):
    from hybridnas.config import read_yaml

    return {"name": name, **read_yaml(Path(sys.modules[Space.__module__].__file__).parent / f"{name}.yaml")}
