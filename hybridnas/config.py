"""Frozen, keyword-only, typed configuration: one line per field with meaning and unit, checked when it is made.

@dataclass(frozen=True, kw_only=True)
class Config(FrozenConfig):
    d_state: int = option(16, "state size N per channel [count]", ge=1)
"""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hybridnas.errors import ConfigError, suggest

C = TypeVar("C", bound="FrozenConfig")
_REQUIRED: Any = dataclasses.MISSING


def option(
    default: Any = _REQUIRED,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """Declare a config field: its default, its one-line meaning with unit, and the values it allows."""
    if not doc:
        raise TypeError("option() needs a one-line doc with the field's meaning and unit")
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "choices": tuple(choices) if choices else None}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Base of every config: strict types and ranges, ``from_dict`` / ``to_dict`` / ``replace``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(type(self), field, getattr(self, field.name))

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all fields in their declared order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def check_value(cls, name: str, value: Any) -> None:
        """Raise ConfigError unless ``name`` may be ``value`` as far as type and range of that one field say."""
        field = next((field for field in dataclasses.fields(cls) if field.name == name), None)
        if field is None:
            raise ConfigError(f"{cls.label()} has no field {name!r}{suggest(name, cls.field_names())}")
        _check(cls, field, value)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any], *, where: str = "", parse: bool = False) -> C:
        """Build from a mapping; ``parse`` also reads strings (``"32"``, ``"true"``, ``"none"``) by field type.

        Raises ConfigError that opens with ``where`` for unknown, missing, mistyped and out-of-range fields.
        """
        place = where or cls.label()
        names = cls.field_names()
        for key in values:
            if key not in names:
                raise ConfigError(f"{place} has no field {key!r}{suggest(str(key), names)}")
        for field in dataclasses.fields(cls):
            if field.default is _REQUIRED and field.default_factory is _REQUIRED and field.name not in values:
                raise ConfigError(f"{place} needs a value for {field.name!r}: {field.metadata.get('doc', '')}")
        hints = _hints(cls)
        read = {k: parse_value(v, hints[k], f"{place} {k}") if parse else v for k, v in values.items()}
        try:
            return cls(**read)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}" if where else str(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values (tuples as lists, nested configs as dicts), ready for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def replace(self: C, **changes: Any) -> C:
        """Return a copy with some fields changed and everything checked again."""
        return type(self).from_dict({**{n: getattr(self, n) for n in self.field_names()}, **changes})

    @classmethod
    def label(cls) -> str:
        """Return the words by which errors name this config, e.g. ``Mamba.Config``."""
        return cls.__qualname__


def parse_value(value: Any, hint: Any, where: str) -> Any:
    """Read a string as ``hint`` (int, float, bool, str, or one of these or None); other values pass unchanged."""
    if not isinstance(value, str):
        return value
    allowed = _members(hint)
    if types.NoneType in allowed and value.lower() in ("none", "null"):
        return None
    if bool in allowed and value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(value)
            except ValueError:
                continue
    if str in allowed:
        return value
    raise ConfigError(f"{where}={value!r} is not {_words(hint)}")


def _check(config: type[FrozenConfig], field: dataclasses.Field[Any], value: Any) -> None:
    where = f"{config.label()} {field.name}={value!r}"
    hint = _hints(config)[field.name]
    if not _fits(value, hint):
        raise ConfigError(f"{where} must be {_words(hint)}, got {type(value).__name__}")
    if value is None:
        return
    rules = field.metadata
    if rules.get("choices") and value not in rules["choices"]:
        raise ConfigError(f"{where} must be one of {', '.join(map(str, rules['choices']))}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number")
        for key, holds, word in (("ge", operator.ge, ">="), ("gt", operator.gt, ">"), ("le", operator.le, "<=")):
            bound = rules.get(key)
            if bound is not None and not holds(value, bound):
                raise ConfigError(f"{where} must be {word} {bound}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; raises ConfigError for anything else."""
    import yaml

    try:
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(node).__name__}")
    return {str(key): value for key, value in node.items()}


_HINTS: dict[type, dict[str, Any]] = {}  # get_type_hints is slow and configs are made by the thousand


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for member in _members(hint):
        origin = typing.get_origin(member) or member
        if member is Any or not isinstance(origin, type):
            return True
        if member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        if member is int and isinstance(value, bool):
            continue
        if isinstance(value, origin):
            return True
    return False


def _words(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return " or ".join(names.get(member, getattr(member, "__name__", str(member))) for member in _members(hint))


def _plain(value: Any) -> Any:
    if isinstance(value, FrozenConfig):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
