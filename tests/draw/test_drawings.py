"""Drawings of an architecture: their parts, their formats, and that one architecture gives one file."""

import pytest

from hybridnas.arch.arch import Arch
from hybridnas.draw.mermaid import mermaid
from hybridnas.draw.svg import draw_svg, svg_text
from hybridnas.errors import ConfigError


def small(pattern, **fields):
    return Arch.from_pattern(pattern, d_model=32, vocab_size=64, **fields)


def test_a_drawing_names_its_parts_and_folds_repeats():
    svg = svg_text(small("(ME)x8"))
    assert svg.startswith("<svg")
    for words in ("(ME)x8", "embedding", "head", "mamba", "moe", "\N{MULTIPLICATION SIGN}8", "8 experts of 128"):
        assert words in svg
    assert svg.count(">moe<") == 1


def test_drawing_one_architecture_twice_gives_one_file(tmp_path):
    arch = small("M[M,E]A@sFA@s")
    first, second = draw_svg(arch, tmp_path / "a.svg"), draw_svg(arch, tmp_path / "b" / "b.svg")
    assert first.read_bytes() == second.read_bytes()
    assert b"attention @s" in first.read_bytes()


@pytest.mark.parametrize(("suffix", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path, suffix, magic):
    assert draw_svg(small("M"), tmp_path / f"graph.{suffix}").read_bytes().startswith(magic)


@pytest.mark.parametrize("name", ["graph.jpg", "graph"])
def test_another_suffix_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match=r"must end in \.svg, \.png, \.pdf, got"):
        draw_svg(small("M"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_deep_pattern_without_repeats_wraps_into_columns():
    letters = "".join(("MAFE" * 7)[(7 * i * i + 3 * i + i // 9) % 28] for i in range(40))
    svg = svg_text(small(letters))
    width, height = (float(svg.split(f'{side}="')[1].split("pt")[0]) for side in ("width", "height"))
    assert width > height / 2


def test_mermaid_draws_motif_branches_and_shared_modules():
    text = mermaid(small("(ME)x8[M,E]A@sFA@s"))
    lines = text.splitlines()
    assert lines[0] == "flowchart TD"
    assert '  subgraph g1["\N{MULTIPLICATION SIGN}8"]' in lines
    assert "  embed --> n0_0_0" in lines
    assert "  n17_0_0 -.- n19_0_0" in lines
    assert "  n16_sum --> n17_0_0" in lines
    assert "  n19_0_0 --> head" in lines
    assert text.count(":::E") == 2
