"""Settings by name: a search space, a budget or data, from YAML, without Hydra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridnas.config import FrozenConfig, read_yaml
from hybridnas.errors import ConfigError, suggest
from hybridnas.search_spaces.listing import space_settings

BUDGETS = Path(__file__).resolve().parents[1] / "conf" / "budget"


def named_space(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return a space's settings: those of that name, or the ones that are given; raises ConfigError."""
    return space_settings(given) if isinstance(given, str) else {"name": "space", **_mapping(given, "space")}


def named_budget(given: str | Mapping[str, Any] | FrozenConfig) -> dict[str, Any]:
    """Return a budget's settings: those of that name, or the ones that are given; raises ConfigError."""
    if isinstance(given, str):
        if given not in list_budgets():
            raise ConfigError(
                f"budget={given!r} is unknown{suggest(given, list_budgets())}",
                field="budget",
                got=given,
                allowed=tuple(list_budgets()),
            )
        return {"name": given, **read_yaml(BUDGETS / f"{given}.yaml")}
    return _mapping(given, "budget")


def named_data(given: str | Mapping[str, Any] | FrozenConfig) -> dict[str, Any]:
    """Return the data's settings: those of a kind of data, or the ones that are given."""
    if isinstance(given, str):
        return {"kind": given}
    return _mapping(given, "data")


def _mapping(given: object, field: str) -> dict[str, Any]:
    if isinstance(given, FrozenConfig):
        return given.to_dict()
    if isinstance(given, Mapping):
        return dict(given)
    raise ConfigError(
        f"{field} takes a name, settings as a mapping or a config, got {type(given).__name__}",
        field=field,
        got=type(given).__name__,
        allowed="str, mapping or config",
    )


def list_budgets() -> list[str]:
    """Return the names of the package's budgets."""
    return sorted(path.stem for path in BUDGETS.glob("*.yaml"))
