"""``python -m hybridnas.data describe data.path=...``: what data holds, before anybody trains on it."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done, group
from hybridnas.config import MAX_SEED, option
from hybridnas.data.details import SAMPLES, Details
from hybridnas.units import percent

_SHOWN_SHARES = 8  # of scripts and the like; the others are summed
_SHOWN_CHARACTERS = 160  # of a sample in a table; the JSON has more


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    action: str = option(
        "describe", "what is done; may stand without its key, as in 'data describe'", choices=("describe",)
    )
    data: Mapping[str, Any] = group("text", "what is described")
    samples: int = option(SAMPLES, "examples that are shown [count]", ge=0, le=1000)
    seed: int = option(0, "seed of which examples are shown", ge=0, le=MAX_SEED)

    @classmethod
    def label(cls) -> str:
        return "data"


def run(settings: Settings) -> Done:
    """Open the data, which makes its shards, and print what it holds."""
    from hybridnas.data import open_source, source_config

    source = open_source(source_config(settings.data))
    details = source.details(settings.samples, settings.seed)
    show.line(f"data: {source.describe()}")
    _show(details)
    found = dataclasses.asdict(details)
    return Done({"data": source.describe(), "fingerprint": source.fingerprint, **found})


def _show(details: Details) -> None:
    show.table("Data", ["figure", "value"], [[name, _cell(name, value)] for name, value in details.figures.items()])
    if details.parts:
        columns = list(dict.fromkeys(name for part in details.parts.values() for name in part))
        rows = [[part, *(_cell(name, own.get(name, "")) for name in columns)] for part, own in details.parts.items()]
        show.table("Parts", ["part", *columns], rows)
    if details.shares:
        ordered = list(details.shares.items())
        rest = sum(share for _, share in ordered[_SHOWN_SHARES:])
        shown = [*ordered[:_SHOWN_SHARES], *([("others", rest)] if rest else [])]
        show.table(details.shares_of.capitalize(), ["name", "share"], [[name, percent(share)] for name, share in shown])
    if details.samples:
        rows = [[sample.where, _one_line(sample.text)] for sample in details.samples]
        show.table("Samples", ["where", "beginning"], rows, left=(0, 1))


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return percent(value) if name.startswith(("share", "copied")) else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _one_line(text: str) -> str:
    """Return the beginning of a text without line ends and control characters."""
    cut = " ".join(text[:_SHOWN_CHARACTERS].split())
    return "".join("\ufffd" if unicodedata.category(one).startswith("C") else one for one in cut)
