"""Search spaces: what they may say, what they draw, and that every candidate meets one target."""

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import optuna
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DEFAULT_BASELINES
from hybridnas.config import option
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError, MatchError, PatternError
from hybridnas.layers.block import Block, BlockConfig, BlockOutput
from hybridnas.registry import BLOCKS, register_block
from hybridnas.search_spaces.choice import Options
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.fit import TOLERANCE, fit, share_free
from hybridnas.search_spaces.listing import list_spaces
from hybridnas.search_spaces.placement import PLACEMENTS, place
from hybridnas.search_spaces.space import (
    SHAPES,
    CandidateSpace,
    LetterSpace,
    PlacementSpace,
    Scale,
    Space,
    load_space,
)

SCALE = Scale(d_model=32, depth=4, n_experts=4, multiple=2, seq_len=64)
LETTERS = {"letters": ["M", "E"], "motif_length": [2]}
BASE = {"base": "M", "replace": "M", "insert": "A", "n_inserted": [1]}
SHIPPED = ("attention_placement", "historic", "hybrid", "linear_family", "mamba_moe", "modern", "tabular")
OWN_BASELINES = ("historic", "linear_family", "modern")


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
        sizes = ("active parameters", "active_params", "no width to size", "state bytes")
        words = (*sizes, "requires", "min_attention", "max_mixers", "exportable")
        assert any(word in proposal for word in words), proposal
        return
    assert abs(proposal.arch.cost().active_params - target) <= 0.02 * target
    assert len(proposal.arch.pattern) == depth
    assert proposal.arch.d_model == scale.d_model


def test_the_same_draws_give_the_same_architecture():
    drawn = load_space("mamba_moe")
    first, again = (drawn.propose(Dice(3), SCALE) for _ in range(2))
    assert first.arch.fingerprint() == again.arch.fingerprint()
    assert first.choices == again.choices


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in OWN_BASELINES])
def test_the_five_baselines_meet_one_target(name):
    drawn = load_space(name)
    assert drawn.baselines == DEFAULT_BASELINES == ("moe_mamba", "mamba", "mamba_mlp", "transformer", "transformer_moe")
    target = drawn.target(SCALE)
    for preset in drawn.baselines:
        got = drawn.baseline(preset, SCALE).cost().active_params
        assert abs(got - target) <= TOLERANCE * target, preset
    assert drawn.baseline("moe_mamba", SCALE).cost().active_params == target


def test_a_target_can_be_given():
    scale = SCALE.replace(active_params=40_000)
    assert load_space("hybrid").target(scale) == 40_000
    assert abs(load_space("hybrid").baseline("mamba", scale).cost().active_params - 40_000) <= 800


def test_the_reference_gives_the_target():
    named = space(**LETTERS, reference="transformer", baselines=["transformer"])
    assert named.target(SCALE) == named.baseline("transformer", SCALE).cost().active_params
    assert named.target(SCALE) != space(**LETTERS).target(SCALE)
    assert space(**LETTERS).reference == "moe_mamba"


def test_a_space_without_a_reference_needs_a_target():
    none = space(**LETTERS, reference=None, baselines=[])
    with pytest.raises(ConfigError) as caught:
        none.target(SCALE)
    assert (caught.value.field, caught.value.got) == ("budget.active_params", None)
    assert none.target(SCALE.replace(active_params=40_000)) == 40_000


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
    assert len(list(every_choice(one, SCALE))) == 3


def test_a_candidate_sets_the_fields_of_one_letter_as_a_space_with_choices_does():
    one = {"motif": "ME", "n_experts": 4, "E.top_k": 2, "E.router": "top_k", "M.d_state": 8}
    nested = {"motif": "ME", "n_experts": 4, "E": {"top_k": 2, "router": "top_k"}, "M": {"d_state": 8}}
    mixed = {"motif": "ME", "n_experts": 4, "E": {"top_k": 2}, "E.router": "top_k", "M.d_state": 8}
    archs = [space(candidates=[entry]).propose(Dice(0), SCALE).arch for entry in (one, nested, mixed)]
    assert archs[0] == archs[1] == archs[2]
    expert = list(archs[0].nodes)[1]
    assert (expert.config.top_k, expert.config.router) == (2, "top_k")


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


@pytest.mark.parametrize("letters", ["A", "S", "C", "L", "K", "AS", "GLKA"])
@pytest.mark.parametrize(("d_model", "target", "multiple"), [(32, 20_000, 2), (512, 26_000_000, 8)])
def test_a_pattern_without_widths_is_fitted_by_its_heads_or_its_d_model(letters, d_model, target, multiple):
    arch = fit(Arch.from_pattern(letters * (4 // len(letters)), d_model=d_model, vocab_size=256), target, multiple)
    assert abs(arch.cost().active_params - target) <= 0.02 * target
    assert not share_free(arch.pattern)


def test_a_target_that_heads_and_d_model_cannot_reach_is_refused():
    with pytest.raises(MatchError) as caught:
        fit(Arch.from_pattern("A{head_dim=8192}A{head_dim=8192}", d_model=32, vocab_size=256), 10_000)
    assert caught.value.field == "active_params"


@pytest.fixture
def recurrent():
    """A user's block without any of the usual widths: its own is called d_hidden and unset."""

    @register_block("Q", name="recurrent")
    class Recurrent(Block):
        @dataclass(frozen=True, kw_only=True)
        class Config(BlockConfig):
            widths: ClassVar[tuple[str, ...]] = ("d_hidden",)
            d_hidden: int | None = option(None, "inner width [channels]", ge=1)

            def cost(self, seq_len, dtype_bytes=4):
                params = 3 * self.d_model * (self.d_hidden or self.d_model)
                return Cost(params=params, active_params=params)

        def forward(self, x_BLD, state=None):
            return BlockOutput(x_BLD, state)

        def init_state(self, batch_size, *, device, dtype):
            return ()

        def reset_parameters(self, init_scale=0.1):
            pass

    yield
    BLOCKS.remove("Q")


def test_a_space_is_sized_by_the_width_that_a_users_block_declares(recurrent):
    one = space(letters=["Q", "A"], motif_length=[2], baselines=[])
    target, found = one.target(SCALE), {}
    for seed in range(20):
        proposal = one.propose(Dice(seed), SCALE)
        found[str(proposal.arch.pattern)] = proposal.arch.cost().active_params
    assert set(found) == {"Qx4", "QAQA", "AQAQ", "Ax4"}  # the last one is sized by its heads
    assert all(abs(params - target) <= TOLERANCE * target for params in found.values())


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


@pytest.mark.parametrize(
    ("name", "depth", "count"),
    [
        ("attention_placement", 4, 1 + 3 * 4),  # none or all in one way, else by four placements
        ("attention_placement", 2, 1 + 4 + 1),
        ("hybrid", 4, sum((4**n - 3**n) * 3 + 3**n for n in (2, 3, 4))),  # the number of experts where there are some
    ],
)
def test_enumeration_yields_every_draw_once(name, depth, count):
    listed = list(every_choice(load_space(name), SCALE.replace(depth=depth)))
    assert len(listed) == count == len({str(choices) for choices in listed})


def test_a_range_is_enumerated_up_to_its_last_whole_step():
    ranged = space(letters=["M"], motif_length=[1], **{"M.expand": {"low": 1, "high": 2, "step": 0.6}})
    assert [choices["M.expand"] for choices in every_choice(ranged, SCALE)] == [1.0, 1.6]


def test_an_optuna_trial_is_a_chooser():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    proposal = load_space("hybrid").propose(trial, SCALE)
    assert trial.params == {k: v for k, v in proposal.choices.items() if k in trial.params}
    fixed = optuna.trial.FixedTrial(trial.params)
    assert load_space("hybrid").propose(fixed, SCALE).arch.fingerprint() == proposal.arch.fingerprint()


@pytest.mark.slow
def test_a_space_needs_no_optuna():
    code = "import sys, hybridnas.search_spaces.space; print(sorted({'optuna', 'mlflow', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_users_space_is_found_and_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list_spaces() == sorted(SHIPPED)
    Path("search_spaces").mkdir()
    Path("search_spaces/mine.yaml").write_text("letters: [M, F]\nmotif_length: 2\n")
    Path("search_spaces/hybrid.yaml").write_text("description: ours\nletters: [M]\nmotif_length: [1]\n")
    assert list_spaces() == sorted([*SHIPPED, "mine"])
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


@pytest.mark.parametrize(
    ("keys", "field", "got"),
    [
        ({}, "space", ()),
        ({**LETTERS, **BASE}, "space", ("letters", "base")),
        ({"letter": ["M"], "motif_length": [2]}, "space.letter", "letter"),
        ({"letters": ["M"]}, "space.motif_length", ()),
        ({"base": "M"}, "space.replace", None),
        ({**LETTERS, "n_expert": [1]}, "space.n_expert", "n_expert"),
        ({**LETTERS, "E.n_expert": [1]}, "space.E.n_expert", "E.n_expert"),
        ({**LETTERS, "Q.n_experts": [1]}, "space.Q.n_experts", "Q.n_experts"),
        ({**LETTERS, "A.gate": ["none"]}, "space.A.gate", "A.gate"),
        ({**BASE, "E.top_k": [1]}, "space.E.top_k", "E.top_k"),
        ({**LETTERS, "d_model": [64]}, "space.d_model", "d_model"),
        ({**LETTERS, "n_experts": []}, "space.n_experts", []),
        ({**LETTERS, "n_experts": [0]}, "space.n_experts", 0),
        ({**LETTERS, "n_experts": [-4]}, "space.n_experts", -4),
        ({**LETTERS, "n_experts": ["8"]}, "space.n_experts", "8"),
        ({**LETTERS, "n_experts": [[8]]}, "space.n_experts", [8]),
        ({**LETTERS, "n_experts": {"low": 1, "high": 8}}, "space.n_experts", {"low": 1, "high": 8}),
        (
            {**LETTERS, "n_experts": {"low": 8, "high": 1, "step": 1}},
            "space.n_experts",
            {"low": 8, "high": 1, "step": 1},
        ),
        (
            {**LETTERS, "n_experts": {"low": "a", "high": 1, "step": 1}},
            "space.n_experts",
            {"low": "a", "high": 1, "step": 1},
        ),
        ({**LETTERS, "split": {"low": 0.1}}, "space.split", {"low": 0.1}),
        ({**LETTERS, "motif_length": [0]}, "space.motif_length", 0),
        ({**LETTERS, "requires": ["Q"]}, "space.requires", "Q"),
        ({**LETTERS, "baselines": ["mambo"]}, "space.baselines", "mambo"),
        ({**LETTERS, "reference": "mambo"}, "space.reference", "mambo"),
        ({**LETTERS, "placement": ["first"]}, "space.placement", "placement"),
        ({"letters": ["M", "ME"], "motif_length": [2]}, "space.letters", "ME"),
        ({**BASE, "placement": ["frist"]}, "space.placement", "frist"),
        ({**BASE, "n_inserted": [-1]}, "space.n_inserted", -1),
        ({**BASE, "replace": "E"}, "space.replace", "E"),
        ({"candidates": [{"name": "a"}]}, "space.candidates", {"name": "a"}),
        ({"candidates": ["ME"]}, "space.candidates", "ME"),
        ({"candidates": [{"preset": "mambo"}]}, "space.candidates", "mambo"),
        ({"candidates": [{"motif": "ME", "E.ruoter": "top_k"}]}, "space.candidates", "E.ruoter"),
        ({"candidates": [{"motif": "ME", "Q.router": "top_k"}]}, "space.candidates", "Q.router"),
        ({"candidates": [{"motif": "ME", "d_model": 64}]}, "space.candidates", "d_model"),
        ({"candidates": [{"motif": "ME", "E": 5}]}, "space.candidates", 5),
        ({"candidates": [{"motif": "ME", "E": 5, "E.top_k": 2}]}, "space.candidates", 5),
        ({"candidates": [{"motif": "ME", "E.top_k": 2, "E": 5}]}, "space.candidates", 5),
        ({"candidates": [{"name": "a", "motif": "M"}, {"name": "a", "motif": "E"}]}, "space.candidates", "a"),
        ({"candidates": [{"motif": "M"}], "n_experts": [4]}, "space.n_experts", "n_experts"),
        ({**LETTERS, "match": "maybe"}, "space.match", "maybe"),
    ],
)
def test_a_mistaken_space_is_refused_in_one_sentence(keys, field, got):
    with pytest.raises(ConfigError) as caught:
        space(**keys)
    assert (caught.value.field, caught.value.got) == (field, got)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"letter": ["M"], "motif_length": [2]}, "space 'mine' has no key 'letter'; did you mean 'letters'?"),
        ({**LETTERS, "n_expert": [1]}, "space 'mine' has no choice 'n_expert'; did you mean 'n_experts'?"),
    ],
)
def test_a_mistyped_key_is_met_with_the_nearest(keys, words):
    with pytest.raises(ConfigError) as caught:
        space(**keys)
    assert str(caught.value) == words


@pytest.mark.parametrize(("keys", "shape"), [(LETTERS, LetterSpace), (BASE, PlacementSpace)])
def test_keys_of_another_shape_that_are_empty_are_left_out(keys, shape):
    emptied = {"letters": [], "motif_length": [], "base": None, "candidates": [], "split": None, "n_experts": None}
    assert type(space(**{**emptied, **keys})) is shape
    listed = space(**{**emptied, "requires": [], "candidates": [{"motif": "ME"}]})
    assert type(listed) is CandidateSpace
    assert set(SHAPES.values()) == {LetterSpace, PlacementSpace, CandidateSpace}


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"letters": ["M", "Q"], "motif_length": [1]}, "space.letters"),
        ({**BASE, "insert": "Q"}, "space.insert"),
        ({"candidates": [{"motif": "Q"}]}, "space.candidates"),
    ],
)
def test_unknown_letters_are_pointed_at(keys, field):
    with pytest.raises(PatternError, match=r"space 'mine' .* unknown letter 'Q'") as caught:
        space(**keys)
    assert (caught.value.field, caught.value.got) == (field, "Q")


def test_an_unknown_letter_in_a_file_names_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("search_spaces").mkdir()
    Path("search_spaces/mine.yaml").write_text("letters: [M, Q]\nmotif_length: 2\n")
    with pytest.raises(PatternError, match=r"^search_spaces.mine\.yaml: space 'mine' letters: pattern 'Q' has unknown"):
        load_space("mine")


def test_narrowing_a_choice_keeps_the_rest():
    narrowed = Space.from_mapping({**load_mapping("mamba_moe"), "n_experts": [8, 16]})
    assert narrowed.fields["n_experts"] == Options((8, 16))
    assert narrowed.letters == load_space("mamba_moe").letters


def load_mapping(name):
    from hybridnas.config import read_yaml

    return {"name": name, **read_yaml(Path(sys.modules[Space.__module__].__file__).parent / f"{name}.yaml")}


def test_what_stands_around_a_block_is_a_choice_like_any_other():
    drawn = space(letters=["M", "A", "F{canon=2}"], motif_length=[2], canon=[0, 4], **{"A.norm_position": ["post"]})
    proposals = [proposed(drawn, Dice(seed), SCALE) for seed in range(40)]
    archs = [proposal.arch for proposal in proposals if not isinstance(proposal, str)]
    target = drawn.target(SCALE)
    assert all(abs(arch.cost().active_params - target) <= TOLERANCE * target for arch in archs)
    found = {(n.slot.letter, n.config.canon, n.config.norm_position) for arch in archs for n in arch.nodes}
    assert found == {("M", 0, "pre"), ("M", 4, "pre"), ("A", 0, "post"), ("A", 4, "post"), ("F", 2, "pre")}


def test_a_slot_can_have_sizes_of_its_own():
    drawn = space(
        letters=["E", "A"],
        motif_length=[2],
        per_slot=["E.top_k", "n_heads"],
        **{"E.top_k": [1, 2, 4], "n_heads": [1, 2, 4], "E.router": "top_k"},
    )
    chooser = optuna.trial.FixedTrial(
        {"slot0": "E", "slot1": "A", "E.top_k.0": 4, "n_heads.1": 2} | {"n_heads.0": 1, "E.top_k.1": 1}
    )
    proposal = drawn.propose(chooser, SCALE)
    assert str(proposal.arch.pattern).startswith("(E{top_k=4}A{n_heads=2})x2")
    assert proposal.choices["E.top_k.0"] == 4
    assert "E.top_k.1" not in proposal.choices  # attention has none
    assert abs(proposal.arch.cost().active_params / drawn.target(SCALE) - 1) <= TOLERANCE


@limits(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_widths_of_slots_keep_their_proportions_and_the_target(seed):
    drawn = space(letters=["M", "E", "F"], motif_length=[4], width_ratio=[0.5, 1, 2], n_experts=4)
    scale = SCALE.replace(d_model=64, multiple=1)
    proposal = proposed(drawn, Dice(seed), scale)
    if isinstance(proposal, str):
        return
    assert abs(proposal.arch.cost().active_params / drawn.target(scale) - 1) <= TOLERANCE
    widths = {node.layer: node.config.hidden for node in proposal.arch.nodes if node.slot.letter in ("E", "F")}
    common = {
        letter: {
            round(widths[node.layer] / proposal.choices[f"width_ratio.{node.layer % 4}"])
            for node in proposal.arch.nodes
            if node.slot.letter == letter
        }
        for letter in ("E", "F")
    }
    ratios = {proposal.choices[f"width_ratio.{layer % 4}"] for layer in widths}
    if len(ratios) > 1:
        assert max(common["E"] | common["F"]) - min(common["E"] | common["F"]) <= 2  # roundings of halves


def test_rules_in_words_are_kept_by_every_proposal():
    drawn = space(letters=["M", "N", "A", "F"], motif_length=[4], min_attention=1, max_mixers=1)
    patterns = [proposed(drawn, Dice(seed), SCALE) for seed in range(60)]
    kept = [proposal for proposal in patterns if not isinstance(proposal, str)]
    assert kept
    for proposal in kept:
        letters = {slot.letter for slot in proposal.arch.pattern.slots}
        assert "A" in letters
        assert len(letters & {"M", "N"}) <= 1
    with pytest.raises(MatchError) as found:
        drawn.propose(optuna.trial.FixedTrial({f"slot{i}": "MNAF"[i] for i in range(4)}), SCALE)
    assert found.value.field == "space.max_mixers"
    assert found.value.got == ("M", "N")
    with pytest.raises(MatchError) as found:
        drawn.propose(optuna.trial.FixedTrial({f"slot{i}": "MFMF"[i] for i in range(4)}), SCALE)
    assert (found.value.field, found.value.got) == ("space.min_attention", 0)


@pytest.mark.parametrize(
    "letter", [x for x in BLOCKS if set(BLOCKS.get(x).Config.state_sizes) & set(BLOCKS.get(x).Config.field_names())]
)
def test_candidates_can_carry_equally_many_bytes(letter):
    wanted = 17_000 if letter == "W" else 40_000  # heads of W divide its width: few sizes can be had
    drawn = space(candidates=[{"motif": f"{letter}F"}], equal=["state_bytes"], state_bytes=wanted)
    scale = Scale(d_model=64, depth=4, multiple=1, seq_len=64)
    cost = drawn.propose(Dice(0), scale).arch.cost(scale.seq_len)
    assert cost.state_bytes == pytest.approx(wanted, rel=0.05)
    assert cost.active_params == pytest.approx(drawn.target(scale), rel=TOLERANCE)


def test_a_state_that_cannot_be_made_equal_is_refused():
    attention = space(candidates=[{"motif": "AF"}], equal=["state_bytes"])
    with pytest.raises(MatchError) as found:
        attention.propose(Dice(0), SCALE)
    assert found.value.field == "space.equal"
    assert "M" in found.value.allowed
    alone = space(candidates=[{"motif": "M"}], equal=["state_bytes"], state_bytes=60_000)
    with pytest.raises(MatchError) as found:
        alone.propose(Dice(0), SCALE.replace(active_params=200_000))
    assert found.value.field == "space.equal"
    assert found.value.allowed == 60_000


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"per_slot": ["n_heads"]}, "space.per_slot"),
        ({"per_slot": ["d_expert"], "d_expert": [8, 16]}, "space.per_slot"),
        ({"width_ratio": [0, 1]}, "space.width_ratio"),
        ({"equal": ["latency"]}, "space.equal"),
        ({"min_attention": -1}, "space.min_attention"),
    ],
)
def test_rules_that_mean_nothing_are_refused(keys, field):
    with pytest.raises(ConfigError) as found:
        space(**LETTERS, **keys)
    assert found.value.field == field


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({"letters": ["M", "A"], "motif_length": [2]}, 4),
        ({"letters": ["M", "[A,S]"], "motif_length": [1]}, 8),
        ({"letters": ["M", "F"], "motif_length": [2]}, 0),
        ({**BASE, "n_inserted": [1, 3, 9]}, 3),
        ({"base": "AM", "replace": "A", "insert": "F", "n_inserted": [1, 2]}, 1),
    ],
)
def test_more_attention_than_any_pattern_has_is_refused_before_anything_is_drawn(keys, most):
    space(**keys, min_attention=most).check(SCALE)
    with pytest.raises(ConfigError) as found:
        space(**keys, min_attention=most + 1).check(SCALE)
    assert (found.value.field, found.value.got, found.value.allowed) == (
        "space.min_attention",
        most + 1,
        f"0 to {most}",
    )


def test_the_modern_space_has_attention_and_one_kind_of_mixer_and_its_baselines_match():
    drawn = load_space("modern")
    scale = Scale(d_model=48, depth=4, seq_len=256)
    for preset in drawn.baselines:
        got = drawn.baseline(preset, scale).cost().active_params
        assert got == pytest.approx(drawn.target(scale), rel=TOLERANCE), preset
    kept = [one for seed in range(60) if not isinstance(one := proposed(drawn, Dice(seed), scale), str)]
    assert len(kept) >= 5
    for proposal in kept:
        roles = {slot.letter: BLOCKS.get(slot.letter).role for slot in proposal.arch.pattern.slots}
        assert "attention" in roles.values()
        assert list(roles.values()).count("mixer") <= 1


def test_the_linear_family_has_equal_states_and_equal_active_parameters():
    drawn = load_space("linear_family")
    for d_model in (32, 48, 64):
        scale = Scale(d_model=d_model, depth=4, seq_len=256)
        reference = drawn.baseline("mamba_mlp", scale).cost(scale.seq_len)
        for candidate in drawn.candidates:
            cost = drawn.propose(optuna.trial.FixedTrial({"candidate": candidate.name}), scale).arch.cost(256)
            assert cost.state_bytes == pytest.approx(reference.state_bytes, rel=0.05)
            assert cost.active_params == pytest.approx(reference.active_params, rel=TOLERANCE)


def test_the_historic_space_has_every_mixer_alone_and_with_attention_at_equal_active_parameters():
    drawn, scale = load_space("historic"), Scale(d_model=32, depth=8, seq_len=64)
    target = drawn.target(scale)
    letters = set()
    for candidate in drawn.candidates:
        arch = drawn.propose(optuna.trial.FixedTrial({"candidate": candidate.name}), scale).arch
        assert arch.cost().active_params == pytest.approx(target, rel=TOLERANCE)
        letters |= set(arch.pattern.letters)
    mixers = {letter for letter in BLOCKS if BLOCKS.get(letter).role == "mixer"}
    assert mixers - letters == {"C", "R"}  # not of the study


@pytest.mark.parametrize(("format", "letters"), [("nemotron_h", "NAFE"), ("lfm2", "CAF")])
def test_a_space_can_be_restricted_to_what_a_class_of_transformers_holds(format, letters):
    from hybridnas.export.hf.fitting import fit as held_by

    settings = {"letters": [*letters, "S"], "motif_length": [2], "n_experts": [4], "A.gate": ["none", "head"]}
    drawn = space(**settings, exportable=format)
    found = [proposed(drawn, Dice(seed), SCALE) for seed in range(20)]
    kept = [proposal.arch for proposal in found if not isinstance(proposal, str)]
    assert kept
    for arch in kept:
        assert held_by(arch, format).name == format
        assert arch.model.norm == "rmsnorm"
    with pytest.raises(MatchError) as error:
        drawn.propose(optuna.trial.FixedTrial({"slot0": "A", "slot1": "F", "A.gate": "head"}), SCALE)
    assert (error.value.field, error.value.got, error.value.allowed) == ("space.exportable", "head", ("none",))
    with pytest.raises(MatchError) as error:
        drawn.propose(optuna.trial.FixedTrial({"slot0": "S", "slot1": "F"}), SCALE)
    assert error.value.field == "space.exportable"
    with pytest.raises(ConfigError) as error:
        space(**settings, exportable="bert")
    assert (error.value.field, error.value.got) == ("space.exportable", "bert")
    assert format in error.value.allowed
