"""What people see: rich tables in a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Literal


def is_terminal() -> bool:
    """Whether standard output is looked at by a person."""
    return sys.stdout.isatty()


def line(text: str) -> None:
    """Print one line."""
    print(text, flush=True)


def text(sentence: str) -> None:
    """Print a sentence, in a terminal between words as wide as it is; for commands take ``line``, to be copied."""
    if is_terminal():
        width = shutil.get_terminal_size().columns
        sentence = textwrap.fill(sentence, width, break_long_words=False, break_on_hyphens=False)
    print(sentence, flush=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    spare: Sequence[int] = (),
) -> None:
    """Print a table; ``left`` are the columns aligned left (text), the others are numbers.

    In a terminal cells wrap between words. Where the longest words do not fit beside each other, the columns that
    ``spare`` names are left out, the first of it first; where that is not enough, each row is printed as text of its
    own, a column's name before each cell. A pipe gets all columns.
    """
    if not is_terminal():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if spare and _least(columns, rows) > console.width:
        kept = [place for place in range(len(columns)) if place != spare[0]]
        return table(
            title,
            [columns[place] for place in kept],
            [[row[place] for place in kept] for row in rows],
            left=[kept.index(place) for place in left if place in kept],
            spare=[kept.index(place) for place in spare[1:]],
        )
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    words = [max(len(word) for cell in own for word in [*cell.split(), ""]) for own in cells]
    lines = [max(map(len, own)) for own in cells]
    padding = next((pad for pad in (1, 0) if sum(words) + _around(len(columns), pad) <= console.width), None)
    if padding is None:
        console.print(Text(title, style="bold"))
        for row in rows:
            named = ", ".join(f"{column} {cell}" for column, cell in zip(columns[1:], row[1:], strict=True) if cell)
            console.print(Text(f"{row[0]}: {named}" if row[0] else named))
        return
    heading = Text(title, style="bold")  # Text, since rich reads a plain "[tokens]" as a style and leaves it out
    shown = Table(title=heading, box=box.SIMPLE_HEAD, padding=(0, padding), title_justify="left", title_style="bold")
    widths = _widths(words, lines, console.width - _around(len(columns), padding))
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index in left else "right"
        shown.add_column(Text(column), justify=justify, overflow="fold", width=widths[index])
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)


def _least(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Return the width below which words would be broken."""
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    return sum(max(len(word) for cell in own for word in [*cell.split(), ""]) for own in cells) + _around(len(cells), 0)


def _around(columns: int, padding: int) -> int:
    """Return the characters of a line of a table that are not cells: one around each column, and the padding."""
    return columns + 1 + 2 * padding * columns


def _widths(words: Sequence[int], lines: Sequence[int], room: int) -> list[int]:
    """Return a width for each column, at least its longest word and at most its longest line, that fill the room."""
    missing = [line - word for word, line in zip(words, lines, strict=True)]
    spare = min(sum(missing), room - sum(words))
    return [word + spare * own // max(1, sum(missing)) for word, own in zip(words, missing, strict=True)]
