"""Architectures: where a field's value comes from, what identifies one, what it costs, and how its table adds up."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.arch.arch import Arch
from hybridnas.arch.pattern import parse
from hybridnas.arch.presets import preset
from hybridnas.cost import Cost
from hybridnas.draw.table import describe_layers
from hybridnas.errors import ConfigError


def small(pattern, **fields):
    return Arch.from_pattern(pattern, **{"d_model": 32, "vocab_size": 64, **fields})


def configs(arch):
    return [node.config for node in arch.nodes]


def test_a_slots_argument_wins_over_its_letters_field_over_the_common_field_over_the_default():
    arch = small("E{n_experts=2}EM", n_experts=4, E={"top_k": 1})
    assert [c.n_experts for c in configs(arch)[:2]] == [2, 4]
    assert [c.n_experts for c in configs(small("EE", n_experts=4, E={"n_experts": 3}))] == [3, 3]
    assert [c.n_experts for c in configs(small("E"))] == [8]


@pytest.mark.parametrize(
    ("arch", "width"),
    [
        (lambda: small("M{expand=4}", d_inner=40), 128),
        (lambda: small("M{d_inner=40}", expand=4.0), 40),
        (lambda: small("M", expand=3.0).replace(d_inner=40), 40),
        (lambda: small("M", d_inner=40).replace(expand=3.0), 96),
        (lambda: small("M", d_inner=40, M={"expand": 3.0}), 96),
        (lambda: small("M", M={"d_inner": 40}).replace(M={"expand": 3.0}), 96),
    ],
)
def test_of_a_factor_and_a_width_the_one_given_nearer_counts(arch, width):
    assert configs(arch())[0].width == width


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small("MMMM{dstate=4}"), r"^layer 3 \(M mamba\) has no field 'dstate'; did you mean 'd_state'\?$"),
        (lambda: small("AM{d_state=big}"), r"^layer 1 \(M mamba\) d_state='big' is not an integer$"),
        (lambda: small("M{d_state=0}"), r"^layer 0 \(M mamba\): mamba d_state=0 must be >= 1$"),
        (lambda: small("M{d_model=8}"), r"layer 0 \(M mamba\) cannot set d_model=8: the residual stream has one width"),
        (
            lambda: small("ME", n_expert=4),
            r"no block of pattern 'ME' has a field 'n_expert'; did you mean 'n_experts'\?",
        ),
        (lambda: small("AF", n_experts=4), "no block of pattern 'AF' has a field 'n_experts'"),
        (lambda: small("AF", E={"n_experts": 4}), r"pattern 'AF' has no E \(moe\) to set"),
        (lambda: small("AF", F=4), "F=4 must be a mapping of mlp fields"),
        (lambda: small("E", n_experts=0), "n_experts=0 must be >= 1"),
        (lambda: small("E", n_experts=-3), "n_experts=-3 must be >= 1"),
        (lambda: small("A", n_heads=5), "n_heads=5 does not divide d_model=32; use n_heads="),
        (lambda: small("A", n_heads="4x"), "n_heads='4x' is not"),
        (lambda: small("M", d_model=0), "architecture d_model=0 must be >= 1"),
        (lambda: small("M", d_model="32"), "architecture d_model='32' must be an integer, got str"),
        (lambda: small("M", norm="batchnorm"), "architecture norm='batchnorm' must be one of layernorm, rmsnorm"),
        (lambda: Arch.from_pattern("M", d_model=8), "architecture needs a value for 'vocab_size'"),
        (lambda: small("M").replace(d_states=4), r"has a field 'd_states'; did you mean 'd_state'\?"),
        (lambda: Arch.from_dict({"d_model": 8}), "an architecture needs a 'pattern'"),
        (lambda: Arch.from_dict({**small("M").to_dict(), "blocks": {"Q": {}}}), "blocks has unknown letter 'Q'"),
    ],
)
def test_a_wrong_field_is_named_with_its_place_and_what_is_allowed(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda: small("(ME)x2"), lambda: small("MEME")),
        (lambda: small("[M,E]"), lambda: small("[E,M]")),
        (lambda: small("A-*"), lambda: small("AFA")),
        (lambda: small("M"), lambda: small("M{d_state=16}")),
        (lambda: small("M"), lambda: small("M", d_state=16)),
        (lambda: small("M"), lambda: small("M", expand=2.0)),
        (lambda: small("M"), lambda: small("M", d_inner=64)),
        (lambda: small("M{expand=3}"), lambda: small("M{d_inner=96}")),
        (lambda: small("M{d_state=016}"), lambda: small("M")),
        (lambda: small("A"), lambda: small("A", n_heads=1, n_kv_heads=1, head_dim=32)),
        (lambda: small("F"), lambda: small("F", d_ff=128)),
        (lambda: small("EM", n_experts=4), lambda: small("E{n_experts=4}M")),
        (lambda: small("A@sMA@s"), lambda: small("A@tMA@t")),
        (lambda: small("A{n_heads=2}@sMA@s"), lambda: small("A@sMA{n_heads=2}@s")),
        (lambda: small("A@s"), lambda: small("A")),
        (lambda: small("M").replace(pattern="ME"), lambda: small("ME")),
    ],
)
def test_two_spellings_of_one_architecture_have_one_fingerprint(left, right):
    assert left().fingerprint() == right().fingerprint()
    assert left().cost() == right().cost()


def test_different_architectures_have_different_fingerprints():
    kinds = [
        small("ME"),
        small("EM"),
        small("MEM"),
        small("[M,E]"),
        small("[M,M]"),
        small("MM"),
        small("M@sM@s"),
        small("M@sM@sM"),
        small("MM@sM@s"),
        small("ME", d_state=8),
        small("ME", n_experts=4),
        small("ME", final_norm=True),
        small("ME", norm="rmsnorm"),
        small("ME", tie_embeddings=True),
        small("ME", vocab_size=65),
        small("ME", d_model=40),
        small("ME", init_scale=0.2),
        small("A"),
        small("A", positions="none"),
        small("A", rope_base=500.0),
    ]
    assert len({arch.fingerprint() for arch in kinds}) == len(kinds)


def test_parallel_branches_that_differ_in_arguments_alone_keep_one_fingerprint():
    assert small("[M{d_state=8},M]").fingerprint() == small("[M,M{d_state=8}]").fingerprint()
    assert small("[M{d_state=16},E]").fingerprint() == small("[M,E]").fingerprint()
    assert small("[M{expand=1},M{d_state=8}]").fingerprint() == small("[M{d_inner=32},M{d_state=8}]").fingerprint()


def test_names_of_shares_in_parallel_branches_do_not_change_the_fingerprint():
    assert small("[A@s,A@t]A@s").fingerprint() == small("[A@t,A@s]A@t").fingerprint()
    assert small("[A@s,A@t]A@s").fingerprint() != small("[A,A]A").fingerprint()


def test_a_fingerprint_is_64_hex_and_its_short_form_opens_it():
    arch = small("ME")
    assert len(arch.fingerprint()) == 64
    assert int(arch.fingerprint(), 16) >= 0
    assert arch.short == arch.fingerprint()[:12]


LAYERS = ["M", "A", "F", "E", "[M,E]", "[A,MF]", "A@s", "E{n_experts=2}", "M{expand=1}", "F@t"]
patterns = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6).map("".join)


@settings(max_examples=40, deadline=None)
@given(patterns, st.booleans(), st.booleans())
def test_every_architecture_survives_json(pattern, tied, final):
    arch = small(pattern, tie_embeddings=tied, final_norm=final)
    back = Arch.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert back == arch
    assert back.fingerprint() == arch.fingerprint()
    assert arch.replace() == arch


def test_replace_keeps_what_it_is_not_asked_to_change():
    arch = small("ME", n_experts=4, M={"d_state": 8}).replace(pattern="EMF", d_model=48, top_k=2, router="top_k")
    assert (arch.d_model, arch.vocab_size, str(arch.pattern)) == (48, 64, "EMF")
    moe, mamba, mlp = configs(arch)
    assert (moe.n_experts, moe.top_k, mamba.d_state, mlp.hidden) == (4, 2, 8, 192)


def test_a_shared_module_counts_once_in_parameters_and_each_time_in_work_and_state():
    one, two = small("A@sM").cost(), small("A@sMA@s").cost()
    norm = 2 * 32
    assert two.params == one.params + norm
    assert two.active_params == one.active_params + norm
    again = configs(small("A"))[0].cost(1024)
    assert two.flops_per_token == one.flops_per_token + again.flops_per_token
    assert two.state_bytes == one.state_bytes + again.state_bytes


def test_a_parallel_layer_costs_its_branches_and_one_norm():
    norm = 2 * 32
    assert small("[M,E]").cost().params == small("ME").cost().params - norm
    assert small("[M,E]").cost().flops_per_token == small("ME").cost().flops_per_token
    assert small("[M,E]").cost().state_bytes == small("ME").cost().state_bytes


def test_embeddings_are_counted_aside_and_a_tied_pair_once():
    assert small("M").cost().embedding_params == 2 * 32 * 64
    assert small("M", tie_embeddings=True).cost().embedding_params == 32 * 64
    assert small("M", tie_embeddings=True).cost().params == small("M").cost().params


def test_a_norm_before_the_head_and_rmsnorm_change_the_count_by_their_weights():
    plain = small("MF").cost().params
    assert small("MF", final_norm=True).cost().params == plain + 64
    assert small("MF", norm="rmsnorm").cost().params == plain - 2 * 32


def test_an_architecture_is_causal_when_all_its_blocks_are():
    assert small("ME").causal
    assert not small("ME", router="expert_choice").causal


@settings(max_examples=40, deadline=None)
@given(patterns, st.booleans(), st.integers(1, 3), st.sampled_from([64, 1024]))
def test_the_rows_of_the_table_add_up_to_the_cost(pattern, final, times, seq_len):
    arch = small(f"({pattern})x{times}", final_norm=final)
    table = describe_layers(arch, seq_len)
    assert table.total == arch.cost(seq_len)
    assert sum((row.cost for row in table.rows), start=Cost()) == table.total
    covered = sorted({layer for row in table.rows for layer in row.layers})
    assert covered == list(range(len(arch.pattern)))
    leaves = [layer for leaf in arch.pattern.motif.leaves() for layer in leaf.layers]
    assert sorted(leaves) == covered


def test_a_folded_pattern_has_one_row_for_each_letter_of_its_motif():
    rows = describe_layers(small("(ME)x8")).rows
    assert [(row.where, row.letter) for row in rows] == [
        ("", ""),
        ("0, 2 .. 14 (8)", "M"),
        ("1, 3 .. 15 (8)", "E"),
        ("", ""),
        ("", ""),
    ]
    assert rows[1].sizes == "d_inner 64, d_state 16"
    assert rows[2].sizes == "8 experts of 128"


@pytest.mark.parametrize("text", ["MFMFMFM(A(FM)x5)x4F", "((ME)x2A)x3[M,E]x2", "A@sx3ME"])
def test_the_motif_puts_every_layer_where_the_pattern_has_it(text):
    pattern = parse(text)
    for leaf in pattern.motif.leaves():
        assert len({pattern.layers[layer] for layer in leaf.layers}) == 1


@pytest.mark.parametrize(
    "arch",
    [
        lambda name: small("EM", router="top_k", E={"top_k": 2, name: True}),
        lambda name: small("EM", router="top_k", top_k=2, **{name: True}),
        lambda name: small(f"E{{{name}=true}}M", router="top_k", top_k=2),
        lambda name: small("EM", router="top_k", top_k=2, renormalize=False).replace(E={name: True}),
        lambda name: small("EM", router="top_k", top_k=2, renormalize=False).replace(**{name: True}),
    ],
)
def test_a_renamed_field_is_read_by_its_former_name_and_keeps_its_fingerprint(arch):
    for name in ("renormalize", "renormalise"):
        assert next(arch(name).nodes).config.renormalize
        # as version 0.1 computed it for renormalise=True
        assert arch(name).fingerprint() == "bc6dbf3739627e128ce0b16082bb6bd4a92b3276c1490ccc0468ed10ea864e3d"
        assert Arch.from_dict(arch(name).to_dict()).fingerprint() == arch(name).fingerprint()


@pytest.mark.parametrize(
    ("pattern", "fields", "fingerprint"),
    [
        (
            "MNAFE[M,E]A@sA@s",
            {"N": {"d_state": 16}},
            "308e3cf281d4b854e7f1fe12b556c7d68d325026ffcc3c9d1892820117758ac7",
        ),
        (
            "M{d_state=8}[MF,E{n_experts=2}]",
            {"final_norm": True, "norm": "rmsnorm"},
            "deefcf3ca3d0daea29a9478d7fb01ce3c9ab9cce53047e863f195fec293889c2",
        ),
    ],
)
def test_fingerprints_are_those_of_version_0_1(pattern, fields, fingerprint):
    assert small(pattern, **fields).fingerprint() == fingerprint


def test_numpys_numbers_are_those_of_python_wherever_a_size_is_given():
    sizes = {"d_model": np.int64(32), "vocab_size": np.int32(64), "n_experts": np.int64(4)}
    arch = Arch.from_pattern("ME", **sizes, E={"capacity_factor": np.float32(1.5)})
    assert Arch.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch
    plain = Arch.from_pattern("ME", d_model=32, vocab_size=64, n_experts=4, E={"capacity_factor": 1.5})
    assert (arch, arch.fingerprint()) == (plain, plain.fingerprint())
    assert preset("mamba", d_model=np.int64(64), n_blocks=np.int64(2)) == preset("mamba", d_model=64, n_blocks=2)
