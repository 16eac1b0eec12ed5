"""Edits of an architecture: what they make of a pattern, and where each block comes from."""

import pytest

from hybridnas import Arch
from hybridnas.arch.neighbors import neighbors
from hybridnas.errors import ConfigError, PatternError
from hybridnas.grafting.edits import plan

FIELDS = {"d_model": 16, "vocab_size": 32}


def arch(pattern="AFAFMF", **fields):
    return Arch.from_pattern(pattern, **{**FIELDS, **fields})


@pytest.mark.parametrize(
    ("change", "pattern", "origins"),
    [
        ("2:A->G", "AFGFMF", [0, 1, 2, 3, 4, 5]),
        ("2:->G", "AFGFMF", [0, 1, 2, 3, 4, 5]),
        ("replace 2:A->G", "AFGFMF", [0, 1, 2, 3, 4, 5]),
        ("1{d_ff=80}", "AF{d_ff=80}AFMF", [0, 1, 2, 3, 4, 5]),
        ("+0:N", "NAFAFMF", [None, 0, 1, 2, 3, 4, 5]),
        ("+6:NF", "AFAFMFNF", [0, 1, 2, 3, 4, 5, None, None]),
        ("insert 2:N", "AFNAFMF", [0, 1, None, 2, 3, 4, 5]),
        ("-4", "AFAFF", [0, 1, 2, 3, 5]),
        ("delete 4; delete 5", "AFAF", [0, 1, 2, 3]),
        ("1<->4", "AMAFFF", [0, 4, 2, 3, 1, 5]),
        ("swap 1,4", "AMAFFF", [0, 4, 2, 3, 1, 5]),
        ("4>>0", "MAFAFF", [4, 0, 1, 2, 3, 5]),
        ("0>>5", "FAFMFA", [1, 2, 3, 4, 5, 0]),
        ("2|3", "AF[A,F]MF", [0, 1, 2, 4, 5]),
        ("4:M->[N,F]", "AFAF[F,N]F", [0, 1, 2, 3, 4, 5]),
        ("-0; +2:N; 4:M->G", "FNAFGF", [1, None, 2, 3, 4, 5]),
        ("+2:N; 1<->4", "AMNAFFF", [0, 4, None, 2, 3, 1, 5]),
        ("AFAFGF", "AFAFGF", [0, 1, 2, 3, 4, 5]),
        ("AFAMF", "AFAMF", [0, 1, 2, 4, 5]),
        ("AFAFMFE", "AFAFMFE", [0, 1, 2, 3, 4, 5, None]),
    ],
)
def test_an_edit_gives_this_pattern_of_these_layers(change, pattern, origins):
    found = plan(arch(), change)
    assert found.arch.pattern == Arch.from_pattern(pattern, **FIELDS).pattern
    assert [min(layers) if layers else None for layers in found.origins] == origins


def test_a_parallel_layer_stands_for_both_and_keeps_their_blocks():
    found = plan(arch(), "2|3")
    assert found.origins[2] == (2, 3)
    assert {(part.node.slot.letter, part.origin.layer) for part in found.layers[2]} == {("A", 2), ("F", 3)}
    assert all(part.kept for part in found.parts)


def test_a_branch_beside_a_block_is_new_and_the_block_is_kept():
    found = plan(arch(), "1:F->[F,A]")
    assert {part.node.slot.letter: part.kept for part in found.layers[1]} == {"A": False, "F": True}
    assert {part.node.slot.letter: part.origin is None for part in found.layers[1]} == {"A": True, "F": False}


def test_a_block_that_is_replaced_by_its_like_is_renewed():
    found = plan(arch(), "0:A->A")
    assert [part.kept for part in found.parts] == [False, True, True, True, True, True]


def test_settings_of_new_blocks_are_the_architectures_and_leave_others_alone():
    found = plan(arch(F={"d_ff": 40}), "2:A->G", {"G": {"head_dim": 8}})
    assert [node.config.d_ff for node in found.arch.nodes if node.slot.letter == "F"] == [40] * 3
    assert [part.kept for part in found.parts] == [True, True, False, True, True, True]
    assert found.arch.layers[2][0][0].config.head_dim == 8


def test_attention_with_a_window_has_the_settings_of_attention():
    found = plan(arch(A={"n_heads": 2, "qk_norm": "head"}), "0:A->S{window=8}").arch.layers[0][0][0].config
    assert (found.n_heads, found.qk_norm, found.window) == (2, "head", 8)


def test_every_pattern_one_edit_away_is_reached_by_one_edit():
    start = arch("AFMF")
    for move, pattern in neighbors(start.pattern, "AFN"):
        found = plan(start, pattern)
        assert found.arch.pattern == pattern
        assert len(found.edits) <= (2 if move.startswith("swap") else 1), (move, found.edits)
        again = plan(start, "; ".join(found.edits))
        assert (again.arch.pattern, again.origins) == (pattern, found.origins), move


def test_alignment_prefers_blocks_of_the_same_role():
    assert plan(arch("AFAF"), "AFGF").edits == ("2:A->G",)
    assert plan(arch("AF"), "FG").edits == ("-0", "+2:G")  # the F is kept


@pytest.mark.parametrize(
    ("change", "field", "got", "allowed"),
    [
        ("6:A->G", "edit", "6:A->G", "0 to 5"),
        ("-6", "edit", "-6", "0 to 5"),
        ("+7:G", "edit", "+7:G", "0 to 6"),
        ("1<->9", "edit", "1<->9", "0 to 5"),
        ("1<->1", "edit", "1<->1", "one edit a layer"),
        ("2:M->G", "edit", "M", "A"),
        ("2:A->GG", "edit", "GG", "one layer"),
        ("2:A->G; -2", "edit", "-2", "one edit a layer"),
        ("-0;-1;-2;-3;-4;-5", "edit", "-0;-1;-2;-3;-4;-5", "at least one layer"),
    ],
)
def test_an_edit_that_does_not_fit_the_model_is_refused(change, field, got, allowed):
    with pytest.raises((ConfigError, PatternError)) as error:
        plan(arch(), change)
    assert (error.value.field, error.value.got, error.value.allowed) == (field, got, allowed)


@pytest.mark.parametrize("change", ["2:A=>G", "2 A", "remove 3", "2:A->G; AFAF", "3:"])
def test_what_is_neither_edits_nor_a_pattern_is_refused_with_the_grammar(change):
    with pytest.raises(PatternError) as error:
        plan(arch(), change)
    assert error.value.field == "edit"
    for form in ("3:A->G", "+2:F", "-4", "1<->3"):
        assert form in error.value.allowed


def test_an_unknown_letter_in_an_edit_names_those_that_there_are():
    with pytest.raises(PatternError) as error:
        plan(arch(), "2:A->Q")
    assert (error.value.field, error.value.got) == ("edit", "2:A->Q")
    assert "G" in error.value.allowed


def test_a_width_of_the_stream_that_differs_is_refused():
    with pytest.raises(ConfigError) as error:
        plan(arch(), arch(d_model=32))
    assert (error.value.field, error.value.got, error.value.allowed) == ("d_model", 32, 16)
