"""The only list of blocks: one decorator puts a class in, everything else loops over it.

    @register_block("R", name="rwkv7")
    class RWKV7(Block): ...

Files in ``hybridnas/blocks`` are found by themselves, the first time anybody asks.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hybridnas.errors import ConfigError, LayoutError, suggest

if TYPE_CHECKING:
    from hybridnas.blocks.base import Block

T = TypeVar("T")
B = TypeVar("B", bound="type[Any]")
_PACKAGE = Path(__file__).resolve().parent


class Registry(Generic[T]):
    """A named table that fills itself: ``room`` is a package whose files are imported on first use."""

    def __init__(self, kind: str, room: str | None = None) -> None:
        self.kind = kind
        self._room = room
        self._entries: dict[str, T] = {}
        self._found = room is None

    def add(self, key: str, value: T) -> None:
        """Put a value under a new key; a key that is taken raises ConfigError."""
        if key in self._entries:
            raise ConfigError(
                f"{self.kind} {key!r} is already registered by {self._entries[key]!r}; choose another name"
            )
        self._entries[key] = value

    def remove(self, key: str) -> None:
        """Take a key out again (tests and notebooks that redefine a block)."""
        self._entries.pop(key, None)

    def get(self, key: str) -> T:
        """Return the value under ``key``, or raise ConfigError that names what exists."""
        self._discover()
        if key not in self._entries:
            raise ConfigError(f"unknown {self.kind} {key!r}{suggest(key, self._entries)}")
        return self._entries[key]

    def __contains__(self, key: object) -> bool:
        self._discover()
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._discover()
        return len(self._entries)

    def _discover(self) -> None:
        if self._found or self._room is None:
            return
        self._found = True
        try:
            package = importlib.import_module(self._room)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._room}.{module.name}")
        except BaseException:
            self._found = False  # a broken file is reported again at the next use, never half a table
            raise


BLOCKS: Registry[type[Block]] = Registry("block letter", "hybridnas.blocks")
ALIASES: dict[str, str] = {}  # other spellings of a letter, e.g. '*' for 'A'


def register_block(letter: str, *, name: str, aliases: tuple[str, ...] = ()) -> Callable[[B], B]:
    """Class decorator: make ``cls`` the block that pattern letter ``letter`` stands for.

    Raises ConfigError for a letter that is taken or is not one capital, LayoutError for a second import of one file.
    """

    def decorate(cls: B) -> B:
        refuse_second_name(cls.__module__)
        if len(letter) != 1 or not letter.isascii() or not letter.isupper():
            raise ConfigError(f"block letter {letter!r} of {cls.__name__} must be one capital letter A to Z")
        for alias in aliases:
            if ALIASES.get(alias, letter) != letter:
                raise ConfigError(f"{alias!r} already stands for block letter {ALIASES[alias]!r}; choose another alias")
        BLOCKS.add(letter, cls)
        cls.letter = letter
        cls.name = name
        cls.Config.block_name = name
        ALIASES.update(dict.fromkeys(aliases, letter))
        return cls

    return decorate


def refuse_second_name(module_name: str) -> None:
    """Raise LayoutError when a file of this package is being imported through a linked door (``blocks.mamba``)."""
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if module_name.startswith("hybridnas.") or file is None:
        return
    path = Path(file).resolve()
    if _PACKAGE in path.parents:
        right = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
        raise LayoutError(
            f"{module_name!r} is {right!r} under a second name, through the link in the repository root; "
            f"import {right!r} instead"
        )
