"""``python -m hybridnas.new block NAME``: a block, task or space of one's own from a template, with its test."""

from __future__ import annotations

import keyword
import re
import string
from dataclasses import dataclass
from pathlib import Path
from string import Template

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done
from hybridnas.config import option
from hybridnas.errors import ConfigError
from hybridnas.files import write_text

KINDS = ("block", "task", "space")
KEPT_FREE = "Q"  # the letter that stands for no block in pages and tests
FIRST = "VBIJOPT"  # letters that hybridnas plans no block for: a template takes one of these first
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_WHERE = {"block": "blocks/{}.py", "task": "tasks/{}.py", "space": "search_spaces/{}.yaml"}


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    kind: str | None = option(None, "what is written; may stand without its key, as in 'new block NAME'", choices=KINDS)
    name: str | None = option(None, "its name, which is that of the file; may stand without its key [text]")
    letter: str | None = option(None, "letter of a block in patterns; none: one that is free [A to Z]")
    folder: Path = option(Path(), "folder in which blocks/, tasks/, search_spaces/ and tests/ lie")

    @classmethod
    def label(cls) -> str:
        return "new"


def run(settings: Settings) -> Done:
    """Write the template and its test, and say how to go on; raises ConfigError for a name or letter that is taken."""
    kind, name = settings.kind, settings.name
    if kind is None or name is None:
        raise ConfigError(
            "new needs what and a name: new block NAME, new task NAME or new space NAME",
            field="kind" if kind is None else "name",
            allowed=KINDS,
        )
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower() or name.startswith("_"):
        raise ConfigError(
            f"new {kind} name={name!r} must be a Python name in small letters, such as my_{kind}",
            field="name",
            got=name,
            allowed="small letters, digits, _",
        )
    values = {"name": name, "class_name": "".join(part.capitalize() for part in name.split("_")), "letter": ""}
    if kind == "block":
        values["letter"] = _letter(settings.letter, settings.folder)
    elif settings.letter is not None:
        raise ConfigError(f"new {kind} has no letter; leave letter= out", field="letter", got=settings.letter)
    _free_name(kind, name)
    own = settings.folder / _WHERE[kind].format(name)
    test = settings.folder / "tests" / f"test_{name}.py"
    for path in (own, test):
        if path.exists():
            raise ConfigError(f"new {kind}: {path} exists; choose another name", field="name", got=name)
    for path, template in ((own, f"{kind}.tmpl"), (test, f"{kind}_test.tmpl")):
        text = Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
        write_text(path, text)
        show.line(f"wrote {path}")
    for line in _next(kind, name, values["letter"], test):
        show.line(f"    {line}")
    return Done({"kind": kind, "name": name, "letter": values["letter"] or None, "file": str(own), "test": str(test)})


def _letter(asked: str | None, folder: Path) -> str:
    """Return the letter asked for, or the first that neither a block nor a file in ``blocks/`` has."""
    from hybridnas.plugins import plugin_files
    from hybridnas.registry import BLOCKS

    texts = [path.read_text(encoding="utf-8", errors="replace") for path in plugin_files(folder).values()]
    taken = {letter for text in texts for letter in re.findall(r"""register_block\(\s*["']([A-Z])["']""", text)}
    every = [*FIRST, *(letter for letter in string.ascii_uppercase if letter not in FIRST)]
    free = [letter for letter in every if letter not in BLOCKS and letter not in taken | {KEPT_FREE}]
    found = free[0] if asked is None and free else asked
    if found is None or found not in free:
        raise ConfigError(
            f"new block letter={found!r} is not free; free: {', '.join(free) or 'none'}",
            field="letter",
            got=found,
            allowed=tuple(free),
        )
    return found


def _free_name(kind: str, name: str) -> None:
    """Raise ConfigError where something of this kind has the name."""
    if kind == "block":
        from hybridnas.registry import BLOCKS

        taken = {BLOCKS.get(letter).name for letter in BLOCKS}
    elif kind == "task":
        from hybridnas.data import SOURCES

        taken = set(SOURCES)
    else:
        from hybridnas.search_spaces.listing import list_spaces

        taken = set(list_spaces())
    if name in taken:
        raise ConfigError(f"new {kind}: there is a {kind} {name!r}; choose another name", field="name", got=name)


def _next(kind: str, name: str, letter: str, test: Path) -> list[str]:
    """Return the commands that check, train and search what was written."""
    lines = [f"python -m pytest {test}"]
    if kind == "block":
        sizes = "arch.d_model=32 data=mqar data.n_pairs=4 data.vocab_size=64 train.tokens=20000"
        return [
            *lines,
            f"python -m hybridnas.train plugins=true pattern='({letter}F)x2' {sizes}",
            f"python -m hybridnas.search plugins=true budget=smoke space.letters=[M,F,{letter}]",
        ]
    if kind == "task":
        return [
            *lines,
            f"python -m hybridnas.train plugins=true data={name} pattern=Mx2 arch.d_model=16 train.tokens=50000",
            f"python -m hybridnas.search plugins=true data={name} budget=smoke",
        ]
    return [*lines, f"python -m hybridnas.search space={name} budget=smoke"]
