"""What people see: rich tables in a terminal, tab-separated lines in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def is_terminal() -> bool:
    """Whether standard output is looked at by a person."""
    return sys.stdout.isatty()


def line(text: str) -> None:
    """Print one line of news."""
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


def human(value: float) -> str:
    """Write a count in three figures and a suffix: 26,288,128 as 26.3M."""
    for bound, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:.3g}{suffix}" if abs(value) < 999.5 * bound else f"{value / bound:.0f}{suffix}"
    return f"{value:.4g}"
