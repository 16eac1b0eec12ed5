"""Tables in a terminal: whole words, whatever stands in brackets, at any width."""

import pytest

from hybridnas.cli import show

COLUMNS = ["setting", "pattern", "params"]
ROWS = [["qk_norm_zero_centered", "[M,E]x8 [tokens]", "79,674,391,296"], ["window", "", "0"]]


@pytest.fixture
def shown(monkeypatch, capsys):
    def at(width, columns=COLUMNS, rows=ROWS):
        monkeypatch.setattr(show, "is_terminal", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        show.table("A title [of 3]", columns, rows, left=(0, 1))
        return capsys.readouterr().out

    return at


@pytest.mark.parametrize("width", [30, 49, 52, 60, 80, 200])
def test_no_word_is_broken_and_none_in_brackets_is_lost(shown, width):
    lines = shown(width).splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(lines).replace(":", " ").replace(",", " ").split()
    for cell in (*COLUMNS[1:], *ROWS[0], "[of 3]"):
        for word in cell.replace(",", " ").split():
            assert word in words


def test_a_row_is_one_line_where_there_is_room_for_it(shown):
    assert [line.split() for line in shown(80).splitlines() if "qk_norm" in line] == [
        ["qk_norm_zero_centered", "[M,E]x8", "[tokens]", "79,674,391,296"]
    ]


def test_what_has_no_room_side_by_side_is_written_row_by_row(shown):
    assert shown(45).splitlines() == [
        "A title [of 3]",
        "qk_norm_zero_centered: pattern [M,E]x8 ",
        "[tokens], params 79,674,391,296",
        "window: params 0",
    ]


def test_columns_that_can_be_spared_are_left_out_before_rows_are_written_as_text(monkeypatch, capsys):
    monkeypatch.setattr(show, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "45")
    show.table("A title", COLUMNS, ROWS, left=(0, 1), spare=(2, 1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "qk_norm" in line] == [["qk_norm_zero_centered", "[M,E]x8", "[tokens]"]]
    assert "params" not in "".join(lines)


def test_sentences_wrap_between_words_in_a_terminal_and_not_in_a_pipe(monkeypatch, capsys):
    words = "MM[E,M]M beats moe_mamba by 0.0602 ± 0.0213 nats"
    show.text(words)
    assert capsys.readouterr().out == f"{words}\n"
    monkeypatch.setattr(show, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "20")
    show.text(words)
    assert capsys.readouterr().out.splitlines() == ["MM[E,M]M beats", "moe_mamba by 0.0602", "± 0.0213 nats"]
