"""Which search spaces exist: the package's YAML files, registered ones, and the user's ``./search_spaces/*.yaml``.

Listing names and reading settings load neither torch nor Optuna. Where two have one name, the user's file wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridnas.config import read_yaml
from hybridnas.errors import ConfigError, suggest
from hybridnas.registry import Registry

FOLDER = Path("search_spaces")  # the user's spaces, in the working directory
SPACES: Registry[Mapping[str, Any] | Path] = Registry("search space", groups=("hybridnas.spaces",))


def register_space(name: str, settings: Mapping[str, Any] | str | Path) -> None:
    """Make a search space known under a name: its settings as in a space's YAML, or the path of such a file.

    Raises ConfigError for a name that is taken.
    """
    if name in _packaged():
        raise ConfigError(
            f"search space {name!r} comes with hybridnas; choose another name", field="search space", got=name
        )
    SPACES.add(name, Path(settings) if isinstance(settings, (str, Path)) else dict(settings))


def list_spaces() -> list[str]:
    """Return the names of all spaces: the package's own, registered ones and those in ./search_spaces."""
    return sorted({*_packaged(), *SPACES, *(path.stem for path in FOLDER.glob("*.yaml"))})


def space_settings(name: str) -> dict[str, Any]:
    """Return a space's settings with its name, as its YAML has them; raises ConfigError that lists what exists."""
    path = FOLDER / f"{name}.yaml"
    if path.is_file():
        return {"name": name, **read_yaml(path)}
    if name in _packaged():
        return {"name": name, **read_yaml(_packaged()[name])}
    if name not in SPACES and name not in SPACES.failures:
        names = list_spaces()
        raise ConfigError(
            f"unknown search space {name!r}{suggest(name, names)}", field="space", got=name, allowed=tuple(names)
        )
    settings = SPACES.get(name)
    return {"name": name, **(read_yaml(settings) if isinstance(settings, Path) else settings)}


def space_file(name: str) -> Path | None:
    """Return the YAML file that a space's settings come from, or None for one that was registered as a mapping."""
    path = FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    settings = _packaged().get(name) or (SPACES.get(name) if name in SPACES else None)
    return settings if isinstance(settings, Path) else None


def _packaged() -> dict[str, Path]:
    return {path.stem: path for path in sorted(Path(__file__).resolve().parent.glob("*.yaml"))}
