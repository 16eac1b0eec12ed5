"""What people see: rich tables in a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def is_terminal() -> bool:
    """Whether standard output is looked at by a person."""
    return sys.stdout.isatty()


def line(text: str) -> None:
    """Print one line."""
    print(text, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> None:
    """Print a table; ``left`` are the columns aligned left (text), the others are numbers."""
    if not is_terminal():
        print("\t".join(columns))
        for row in rows:
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
