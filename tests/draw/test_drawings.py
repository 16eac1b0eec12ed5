"""Drawings of an architecture: their parts, their formats, and that one architecture gives one file."""

import pytest

from hybridnas.arch.arch import Arch
from hybridnas.draw.mermaid import mermaid
from hybridnas.draw.palette import INK, color, tint
from hybridnas.draw.strips import draw_strips
from hybridnas.draw.svg import draw_svg, svg_text
from hybridnas.errors import ConfigError
from hybridnas.registry import BLOCKS
from hybridnas.units import human, human_bytes


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


def test_an_svg_is_transparent_and_has_colors_for_a_dark_scheme():
    svg = svg_text(small("M[M,E]A"))
    dark = svg.split("@media screen and (prefers-color-scheme: dark)")[1]
    assert 'id="architecture"' in dark
    assert 'style="fill: #ffffff"' not in svg  # no ground; badges alone have white letters
    for letter in "MEA":
        assert f'fill: {tint(color(letter)).lower()}"]{{fill:{tint(color(letter), "#1E2024", 0.3)}!important}}' in dark


@pytest.mark.parametrize("letter", "MAFENSGKLCRWDHYUXZ")
def test_text_on_a_letters_wash_is_readable_in_both_schemes(letter):
    assert contrast(INK, tint(color(letter))) > 7
    assert contrast("#E9E9EA", tint(color(letter), "#1E2024", 0.3)) > 7


def test_the_letters_of_blocks_have_colors_of_their_own():
    letters = sorted({*BLOCKS, *"MNAFESGKLCRDUWXYHZ"})
    assert len({color(letter) for letter in letters}) == len(letters)


def contrast(one, other):
    """Return the contrast ratio of WCAG 2.1 between two colors, 1 to 21."""

    def luminance(tone):
        parts = [int(tone[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_strips_have_one_bar_for_each_block_and_a_row_of_figures(tmp_path):
    models = [("mixed", small("(MF)x3A")), ("parallel", small("[M,AF]x2"))]
    svg = draw_strips(models, tmp_path / "strips.svg").read_text()
    bars = {letter: svg.count(f'fill="{color(letter)}"') - 1 for letter in "MFA"}  # less one in the legend
    assert bars == {"M": 3 + 2, "F": 3 + 2, "A": 1 + 2}
    cost = models[0][1].cost()
    for words in (
        "mixed",
        "parallel",
        "M mamba",
        str(models[1][1].pattern),
        human(cost.params),
        "state at 4k",
        "state at 128k",
    ):
        assert f">{words}<" in svg
    assert human_bytes(models[0][1].cost(4096).state_bytes) in svg


def test_strips_are_drawn_as_svg_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.svg, got \.png") as caught:
        draw_strips([("one", small("M"))], tmp_path / "strips.png")
    assert (caught.value.field, caught.value.got) == ("out", ".png")
