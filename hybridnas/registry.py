"""Registries of blocks, presets, tasks, spaces: a decorator puts an entry in, everything else loops over it.

    @register_block("V", name="my_block")
    class MyBlock(Block): ...

A registry fills itself the first time it is looked up: it imports every file of its folder in this package (for blocks
``hybridnas/blocks``) and loads the entry points of other installed packages in its group::

    [project.entry-points."hybridnas.blocks"]     # in the other package's pyproject.toml
    V = "my_package.blocks"                       # importing this module registers the block with letter V

The groups are ``hybridnas.blocks``, ``.presets``, ``.tasks``, ``.sources``, ``.spaces`` and ``.suites``. The name of an
entry point is the key (letter or name) that importing it registers. An entry point that cannot be loaded is logged as a
warning, leaves all others usable, and raises ConfigError with its package and reason when its key is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hybridnas.errors import ConfigError, LayoutError, suggest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from hybridnas.layers.block import Block

T = TypeVar("T")
B = TypeVar("B", bound="type[Any]")
_OWN = __name__.partition(".")[0]
PLUGINS = "hybridnas_plugins"  # files of a working folder are modules below this name, see hybridnas.plugins
_REGISTRIES: list[Registry[Any]] = []
_PACKAGE = Path(__file__).resolve().parent
_log = logging.getLogger("hybridnas.registry")


class Registry(Generic[T]):
    """A table from key to value that is filled from a package of ours and from entry points at the first lookup.

    ``kind`` names an entry in errors, ``package`` is imported file by file, ``groups`` are those of the entry points.
    """

    def __init__(self, kind: str, package: str | None = None, *, groups: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.failures: dict[str, str] = {}  # entry point that did not load -> one sentence with package and reason
        self._package = package
        self._groups = groups
        self._entries: dict[str, T] = {}
        self._here: dict[str, str] = {}  # key -> module that registered it, where no other process loads that by itself
        self._package_imported = package is None
        self._filled = package is None and not groups
        self._from_entry_point = False  # what is registered now comes from an installed package
        _REGISTRIES.append(self)

    def add(self, key: str, value: T, origin: str = _OWN) -> None:
        """Put a value under a new key; a key that is taken raises ConfigError.

        ``origin``: the module that registers it. One outside this package is held against every name of ours at once.
        """
        if origin.partition(".")[0] != _OWN:
            self._fill_package()
        if key in self._entries:
            raise ConfigError(
                f"{self.kind} {key!r} is already registered by {self._entries[key]!r}; choose another name",
                field=self.kind,
                got=key,
            )
        self._entries[key] = value
        if not self._from_entry_point and origin.partition(".")[0] not in (_OWN, PLUGINS):
            self._here[key] = origin
        if _recorded is not None:
            _recorded.append((self, key, origin))

    def remove(self, key: str) -> None:
        """Take a key out again, as a notebook that defines its block anew needs it."""
        self._entries.pop(key, None)
        self._here.pop(key, None)
        if self is BLOCKS:
            for alias in [alias for alias, letter in ALIASES.items() if letter == key]:
                del ALIASES[alias]

    def get(self, key: str) -> T:
        """Return the value under ``key``; raises ConfigError that names what exists, or why an entry did not load."""
        if key not in self._entries:
            self._fill()
        if key not in self._entries:
            if key in self.failures:
                raise ConfigError(self.failures[key], field=self.kind, got=key, allowed=tuple(self))
            raise ConfigError(
                f"unknown {self.kind} {key!r}{suggest(key, self._entries)}",
                field=self.kind,
                got=key,
                allowed=tuple(self),
            )
        return self._entries[key]

    def __contains__(self, key: object) -> bool:
        if key not in self._entries:
            self._fill()
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = True  # set first: the files looked up below may ask this registry themselves
        try:
            self._fill_package()
        except BaseException:
            self._filled = False  # a file of ours that fails is reported again at the next lookup
            raise
        for group in self._groups:
            for point in _entry_points().select(group=group):
                self._load(point)

    def _fill_package(self) -> None:
        if self._package is None or self._package_imported:
            return
        self._package_imported = True
        try:
            _import_all(self._package)
        except BaseException:
            self._package_imported = False
            raise

    def _load(self, point: EntryPoint) -> None:
        """Load one entry point; whatever goes wrong inside another package is kept as a failure."""
        self._from_entry_point = True
        try:
            point.load()
            reason = "" if point.name in self._entries else f"{point.value} registers no {self.kind} {point.name!r}"
        except Exception as error:  # code of another package: anything may be raised
            reason = f"{type(error).__name__}: {error}"
        finally:
            self._from_entry_point = False
        if reason:
            package = point.dist.name if point.dist is not None else point.module
            self.failures[point.name] = (
                f"{self.kind} {point.name!r} of package {package!r} could not be loaded ({reason}); "
                f"repair or uninstall {package!r}"
            )
            _log.warning("%s", self.failures[point.name])


_recorded: list[tuple[Registry[Any], str, str]] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Registry[Any], str, str]]]:
    """Collect (registry, key, module) of what is registered inside, so that it can be named or taken back."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@functools.lru_cache(maxsize=1)
def _entry_points() -> Any:
    """Return the entry points of all installed packages, read once; the class differs between versions of Python."""
    from importlib.metadata import entry_points

    return entry_points()


def only_here() -> list[str]:
    """Return what this process has registered and a new one would lack, each with its module.

    That is what a script or a notebook registers itself: not files of this package, entry points of installed packages
    and plugins, which are handed on.
    """
    return [
        f"{registry.kind} {key} (of {origin})"
        for registry in _REGISTRIES
        for key, origin in sorted(registry._here.items())
    ]


def _import_all(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


BLOCKS: Registry[type[Block]] = Registry("block letter", "hybridnas.blocks", groups=("hybridnas.blocks",))
ALIASES: dict[str, str] = {}  # other spellings of a letter, e.g. '*' for 'A'


def register_block(letter: str, *, name: str, aliases: tuple[str, ...] = ()) -> Callable[[B], B]:
    """Class decorator: make a Block the one that pattern letter ``letter`` (A to Z) stands for.

    ``name`` is shown in tables; ``aliases`` are other symbols that a pattern may write for the letter.
    Raises ConfigError for a letter that is taken or is not one capital, LayoutError for a second import of one file.
    """

    def decorate(cls: B) -> B:
        refuse_second_name(cls.__module__)
        if len(letter) != 1 or not letter.isascii() or not letter.isupper():
            raise ConfigError(
                f"block letter {letter!r} of {cls.__name__} must be one capital letter A to Z",
                field="letter",
                got=letter,
                allowed="one capital letter A to Z",
            )
        for alias in aliases:
            if ALIASES.get(alias, letter) != letter:
                raise ConfigError(
                    f"{alias!r} already stands for block letter {ALIASES[alias]!r}; choose another alias",
                    field="aliases",
                    got=alias,
                )
        BLOCKS.add(letter, cls, cls.__module__)
        cls.letter = letter
        cls.name = name
        cls.Config.block_name = name
        ALIASES.update(dict.fromkeys(aliases, letter))
        return cls

    return decorate


def refuse_second_name(module_name: str) -> None:
    """Raise LayoutError when a file of this package is imported through a link in the root (``blocks.mamba``)."""
    module = sys.modules.get(module_name)
    file = getattr(module, "__file__", None)
    if module_name.startswith("hybridnas.") or file is None:
        return
    path = Path(file).resolve()
    if _PACKAGE in path.parents:
        right = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
        raise LayoutError(
            f"{module_name!r} is {right!r} under a second name, through the link in the repository root; "
            f"import {right!r} instead",
            got=module_name,
            allowed=right,
        )
