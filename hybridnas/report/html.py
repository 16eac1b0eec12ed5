"""Parts of the HTML pages: templates, table cells, numbers and names in a fixed width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridnas.report import leaderboard as board
from hybridnas.report.colors import css
from hybridnas.report.plots import library


def render(template: str, **values: Any) -> str:
    """Fill one of this folder's templates; every value is escaped but what is marked as markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(template).render(colors=markup(css()), library=lambda: markup(library()), **values)


def markup(text: str) -> Any:
    """Mark text that is SVG of our own making; the texts in it are escaped where it is made."""
    from markupsafe import Markup

    return Markup(text)


def difference(gap: float | None) -> str:
    """Return a difference of losses with a true minus sign."""
    return board.signed(gap).replace("-", "\u2212")


def cell(text: str, sort: Any, style: str = "") -> dict[str, Any]:
    """Return a table cell: what is read, what it is sorted by, and its class."""
    return {"text": text, "sort": "" if sort is None else sort, "style": style, "strong": "", "dot": "", "link": ""}


def short(text: str, limit: int = 20) -> str:
    """Cut a long name in the middle."""
    return text if len(text) <= limit else f"{text[: limit - 8]}…{text[-7:]}"
