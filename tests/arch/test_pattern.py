"""The pattern grammar: what a string means, how it is spelled back, and how mistakes are pointed at."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.arch.folding import fold, spell
from hybridnas.arch.neighbors import neighbors
from hybridnas.arch.pattern import MAX_LAYERS, Parallel, Pattern, Slot, parse
from hybridnas.errors import ConfigError, PatternError
from hybridnas.layers.block import Block, BlockConfig
from hybridnas.registry import BLOCKS, register_block

NEMOTRON_H = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
JAMBA = "M-MEM-MEA-MEM-ME"


@pytest.fixture
def mamba2():
    """Stand in for letter N where its block is not there yet: patterns need no more than the letter."""
    if "N" in BLOCKS:
        yield
        return

    class Config(BlockConfig):
        pass

    register_block("N", name="mamba2")(type("StandIn", (Block,), {"Config": Config}))
    yield
    BLOCKS.remove("N")


names = st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True).filter(lambda n: not any(a == "x" for a in n[1:]))
plain = st.builds(
    Slot,
    st.sampled_from("MAFE"),
    st.dictionaries(st.sampled_from(["d_state", "n_heads", "a"]), st.sampled_from(["1", "0.5", "1e-3", "silu"])).map(
        lambda args: tuple(sorted(args.items()))
    ),
)
shared = names.map(lambda name: Slot("A", (), name))  # one letter, so that equal names never clash
slots = st.one_of(plain, plain, shared)
branches = st.lists(slots, min_size=1, max_size=3).map(tuple)
parallels = st.lists(branches, min_size=2, max_size=3).map(
    lambda b: Parallel(tuple(sorted(b, key=lambda x: str(Parallel((x, x))))))
)
motifs = st.lists(st.one_of(slots, slots, parallels), min_size=1, max_size=6)
patterns = st.lists(st.tuples(motifs, st.integers(1, 5)), min_size=1, max_size=3).map(
    lambda pieces: "".join("(" + "".join(map(str, motif)) + f")x{times}" for motif, times in pieces)
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(patterns)
def test_every_pattern_reads_back_as_itself(text):
    pattern = parse(text)
    assert parse(str(pattern)) == pattern
    assert str(parse(str(pattern))) == str(pattern)
    assert len(str(pattern)) <= len(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("ME"), min_size=1, max_size=14), st.integers(1, 4))
def test_expanded_and_folded_spellings_meet(letters, times):
    text = "".join(letters)
    expanded = parse(text * times)
    assert parse(f"({text})x{times}") == expanded
    assert str(parse(f"({text})x{times}")) == str(expanded)
    assert expanded.letters == text * times


@pytest.mark.parametrize(
    ("text", "canonical", "depth"),
    [
        ("(ME)x8", "(ME)x8", 16),
        ("MEMEMEMEMEMEMEME", "(ME)x8", 16),
        (" ( M E ) x8 ", "(ME)x8", 16),
        ("((ME)x2A)x3", "(MEMEA)x3", 15),
        ("Mx16", "Mx16", 16),
        ("ME", "ME", 2),
        ("MM", "MM", 2),
        ("M-M-*", "MFMFA", 5),
        ("[M,E]x8", "[E,M]x8", 8),
        ("[MF,E,A]", "[A,E,MF]", 1),
        ("M{d_state=32,d_conv=2}", "M{d_conv=2,d_state=32}", 1),
        ("A@sMA@s", "A@sMA@s", 3),
        ("A@sA@s", "A@sx2", 2),
        ("A@sx4M", "A@sx4M", 5),
        ("A{n_heads=2}@sMA@s", "A{n_heads=2}@sMA{n_heads=2}@s", 3),
        ("A@sMA{n_heads=2}@s", "A{n_heads=2}@sMA{n_heads=2}@s", 3),
    ],
)
def test_the_canonical_spelling_is_the_shortest(text, canonical, depth):
    pattern = parse(text)
    assert (str(pattern), len(pattern)) == (canonical, depth)
    assert parse(canonical) == pattern


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["M", "E", "[M,E]", "A@s"]), min_size=1, max_size=20), st.integers(1, 3))
def test_the_tree_of_motifs_spells_the_canonical_text_and_expands_to_the_layers(letters, times):
    tokens = letters * times
    tree = fold(tokens)
    assert str(tree) == spell(tokens)
    expanded = {}
    for leaf in tree.leaves():
        expanded |= dict.fromkeys(leaf.layers, leaf.token)
    assert [expanded[index] for index in range(len(tokens))] == tokens


def test_folding_118_random_layers_ends_at_once_and_expands_back():
    letters = [("MAFE" * 7)[(7 * i * i + 3 * i) % 28] for i in range(118)]
    assert parse(str(fold(letters))).letters == "".join(letters)
    assert str(fold(["M", "E"] * 2000)) == "(ME)x2000"


def test_an_unknown_letter_is_pointed_at_and_the_known_ones_are_listed():
    with pytest.raises(PatternError) as caught:
        parse("(MMQA)x6")
    lines = str(caught.value).splitlines()
    assert lines[:3] == ["pattern '(MMQA)x6' has unknown letter 'Q' at character 4", "    (MMQA)x6", "       ^"]
    known = lines[3].removeprefix("  known letters: ").split(", ")
    assert {"A attention", "E moe", "F mlp", "G gated_deltanet", "M mamba"} <= set(known)
    assert known == sorted(known)


@pytest.mark.parametrize(
    ("text", "words", "caret"),
    [
        ("", "needs at least one letter at character 1", 0),
        ("()", "needs at least one letter between its brackets at character 2", 1),
        ("M(ME", "has '(' that is never closed at character 2", 1),
        ("ME)", "has ')' without a matching opening bracket at character 3", 2),
        ("M,E", "has ',' without a matching opening bracket at character 2", 1),
        ("[M]", "has a parallel layer with one branch; separate branches by commas: [M,E] at character 1", 0),
        ("[M,E", "has '[' that is never closed at character 1", 0),
        (
            "[M,[A,E]]",
            "has a parallel layer inside a parallel layer; write its branches side by side at character 4",
            3,
        ),
        (
            "[([M,A]),E]",
            "has a parallel layer inside a parallel layer; write its branches side by side at character 1",
            0,
        ),
        ("Mx", "needs a whole number after 'x' at character 2", 1),
        ("Mx0", "repeats 0 times; a repeat is at least 1 at character 2", 1),
        ("Mx5000", f"has more than {MAX_LAYERS} layers at character 1", 0),
        ("[Mx3000,Ex3000]", f"has more than {MAX_LAYERS} layers at character 1", 0),
        ("M" + "(" * 65 + "E", "nests brackets more than 64 deep at character 66", 65),
        ("M{", "needs an argument name at character 3", 2),
        ("M{d_state}", "needs '=' after argument 'd_state': write {key=value} at character 10", 9),
        ("M{d_state=}", "needs a value for argument 'd_state' at character 11", 10),
        ("M{a=1,a=2}", "has argument 'a' twice in one slot at character 7", 6),
        ("M{a=1", "has '{' that is never closed at character 2", 1),
        ("A@", "needs a name after '@' at character 3", 2),
        ("m", "has unknown letter 'm' at character 1", 0),
    ],
)
def test_a_mistake_is_one_sentence_and_a_caret_under_its_place(text, words, caret):
    with pytest.raises(PatternError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"pattern {text!r} {words}"
    assert lines[1] == f"    {text}"
    assert lines[2] == "    " + " " * caret + "^"


def test_one_share_name_is_one_module():
    with pytest.raises(PatternError, match="shares '@s' between A and M; one name is one module, give them different"):
        parse("A@sM@s")
    with pytest.raises(PatternError, match="gives '@s' two sets of arguments"):
        parse("A{n_heads=2}@sA{n_heads=4}@s")


def test_a_pattern_must_be_text():
    with pytest.raises(PatternError, match="a pattern is a string such as '\\(ME\\)x8', got int"):
        parse(8)


@pytest.mark.parametrize("text", [NEMOTRON_H, NEMOTRON_3_NANO, "M-M-M-M*-M-M-M-M*-"])
def test_nemotron_strings_go_in_and_out(text, mamba2):
    pattern = Pattern.from_megatron(text)
    assert len(pattern) == len(text)
    assert pattern.to_megatron() == text
    assert parse(str(pattern)) == pattern


def test_nemotron_patterns_have_the_papers_layers(mamba2):
    eight_b = Pattern.from_megatron(NEMOTRON_H)
    assert (len(eight_b), *(eight_b.letters.count(x) for x in "NFA")) == (52, 24, 24, 4)
    assert [i for i, x in enumerate(eight_b.letters) if x == "A"] == [7, 18, 29, 40]
    nano = Pattern.from_megatron(NEMOTRON_3_NANO)
    assert (len(nano), *(nano.letters.count(x) for x in "NEA")) == (52, 23, 23, 6)
    assert [i for i, x in enumerate(nano.letters) if x == "A"] == [5, 12, 19, 26, 33, 42]


def test_stage_marks_of_megatron_are_dropped(mamba2):
    assert Pattern.from_megatron("M-|M *") == Pattern.from_megatron("M-M*")


def test_jamba_reads_with_our_aliases():
    pattern = parse(f"({JAMBA})x4")
    assert len(pattern) == 64
    assert [i // 2 for i, x in enumerate(pattern.letters) if x == "A"] == [4, 12, 20, 28]
    assert [i // 2 for i, x in enumerate(pattern.letters) if x == "E"] == list(range(1, 32, 2))


def test_megatron_mistakes_are_named(mamba2):
    with pytest.raises(PatternError, match="has symbol 'X' at character 2 without a counterpart here; known symbols"):
        Pattern.from_megatron("MX")
    with pytest.raises(PatternError, match="needs at least one symbol, got an empty text"):
        Pattern.from_megatron(" | ")
    for text, words in [
        ("ME", r"layer 0 \(M\) of pattern 'ME' has no Megatron symbol"),
        ("[A,F]", "is parallel, which Megatron's notation cannot express"),
        ("A{n_heads=2}", "has arguments or a share name"),
        ("A@s", "has arguments or a share name"),
    ]:
        with pytest.raises(PatternError, match=words):
            parse(text).to_megatron()


def test_megatrons_symbol_of_gated_deltanet_is_ours():
    assert str(Pattern.from_megatron("G-G*")) == "GFGA"
    assert parse("GFGA").to_megatron() == "G-G*"


short = st.lists(st.sampled_from(["M", "A", "E", "[M,E]", "A@s"]), min_size=1, max_size=5).map("".join)


@settings(max_examples=30, deadline=None)
@given(short)
def test_neighbors_are_distinct_one_edit_away_and_parse(text):
    start = parse(text)
    found = neighbors(start, ["M", "E", "[M,E]"])
    results = [pattern for _, pattern in found]
    assert start not in results
    assert len(set(results)) == len(results)
    assert found == neighbors(text, ["M", "E", "[M,E]"])
    for move, pattern in found:
        grown = {"insert": 1, "delete": -1, "substitute": 0, "swap": 0}[move.split()[0]]
        assert len(pattern) == len(start) + grown
        assert parse(str(pattern)) == pattern
        if move.startswith("swap"):
            assert sorted(map(str, pattern.layers)) == sorted(map(str, start.layers))
        else:
            assert start in [back for _, back in neighbors(pattern, map(str, start.layers))]


def test_neighbors_of_a_small_pattern_are_these():
    found = neighbors("MA", "ME", min_depth=2, max_depth=3)
    assert found[0] == ("insert M at 0", parse("MMA"))
    assert {str(p) for _, p in found} == {"MMA", "EMA", "MEA", "MAM", "MAE", "EA", "MM", "ME", "AM"}
    assert ("swap M and A at 0", parse("AM")) in found
    assert ("substitute A by E at 1", parse("ME")) in found
    assert [str(p) for _, p in neighbors("MA", "M", max_depth=2)] == ["A", "M", "MM", "AM"]


def test_neighbors_refuse_what_makes_no_sense():
    with pytest.raises(ConfigError, match="needs 1 <= min_depth <= max_depth"):
        neighbors("ME", "M", min_depth=0)
    with pytest.raises(PatternError, match="letter 'ME' spells 2 layers; a move puts in one"):
        neighbors("ME", ["ME"])
