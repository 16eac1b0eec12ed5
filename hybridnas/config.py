"""Frozen, keyword-only, typed configuration: one line per field with meaning and unit, checked when it is made.

    @dataclass(frozen=True, kw_only=True)
    class Config(FrozenConfig):
        d_state: int = option(16, "state size N per channel [count]", ge=1)

The field is the only source of a setting's type, default, bounds and help. Plain values, as JSON, YAML or a script give
them, are read by the field's type: a list for a tuple, one value for a list of one, a mapping for a nested config, a
path with ``~``, ``1e6`` or ``"1M"`` for a whole number. Text from a command line is read by the same types
(:func:`read_text`), so that a field of text takes whatever was typed.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import numbers
import operator
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hybridnas.errors import ConfigError, suggest

C = TypeVar("C", bound="FrozenConfig")
_REQUIRED: Any = dataclasses.MISSING
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_NONE = ("none", "null")
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)([kMGT]?)")
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
MAX_SEED = 2**63 - 1  # greatest seed that torch's generators and our own hashes take


def option(
    default: Any = _REQUIRED,
    doc: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
    aliases: Mapping[str, str] | None = None,
    kinds: Sequence[str] | None = None,
    sizable: bool = False,
    repr: bool = True,
) -> Any:
    """Declare a config field: its default, its one-line meaning with unit, and the values it allows.

    ``aliases`` are further spellings of choices, or of words that mean something special in a field of text; ``kinds``
    the kinds of data that have the field (none: all). Bounds of a tuple's field hold for each of its items.
    ``sizable``: of a block, a size that matches a pattern to a number of active parameters where it has no width.
    """
    if not doc:
        raise TypeError("option() needs a one-line doc with the field's meaning and unit")
    metadata = {
        "doc": doc,
        "ge": ge,
        "gt": gt,
        "le": le,
        "choices": tuple(choices) if choices else None,
        "aliases": dict(aliases or {}),
        "kinds": tuple(kinds) if kinds else None,
        "sizable": sizable,
    }
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, repr=repr)
    return dataclasses.field(default=default, metadata=metadata, repr=repr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """Base of every config: strict types and ranges, ``from_dict`` / ``to_dict`` / ``replace``."""

    prefix: ClassVar[str] = ""  # of its fields in errors, e.g. "budget": the setting is budget.depth

    def __post_init__(self) -> None:
        for field, kinds in _plain_kinds(type(self)):
            given = getattr(self, field.name)
            if type(given) in kinds and _plainly_allowed(field, given):
                continue
            value = _read(type(self), field, given)
            if value is not given:
                object.__setattr__(self, field.name, value)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Return the names of all fields in their declared order."""
        return _names(cls)

    @classmethod
    def field(cls, name: str) -> dataclasses.Field[Any]:
        """Return the field of that name; raises ConfigError that suggests the right spelling."""
        for field in dataclasses.fields(cls):
            if field.name == name:
                return field
        raise _unknown(cls, name, cls.label())

    @classmethod
    def type_of(cls, name: str) -> Any:
        """Return the declared type of a field."""
        return _hints(cls)[cls.field(name).name]

    @classmethod
    def check_value(cls, name: str, value: Any) -> None:
        """Raise ConfigError unless ``name`` may be ``value`` as far as type and range of that one field say."""
        _read(cls, cls.field(name), value)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any], *, where: str = "", parse: bool = False) -> C:
        """Build from a mapping; ``parse`` reads strings as typed text (``"32"``, ``"true"``, ``"none"``) by field type.

        Raises ConfigError that opens with ``where`` for unknown, missing, mistyped and out-of-range fields.
        """
        place = where or cls.label()
        names = cls.field_names()
        for key in values:
            if key not in names:
                raise _unknown(cls, str(key), place)
        for field in dataclasses.fields(cls):
            if field.default is _REQUIRED and field.default_factory is _REQUIRED and field.name not in values:
                doc = field.metadata.get("doc", "")
                raise ConfigError(
                    f"{place} needs a value for {field.name!r}: {doc}", field=_dotted(cls, field.name), allowed=doc
                )
        read = dict(values)
        if parse:
            for key, value in values.items():
                if isinstance(value, str):
                    read[key] = cls.read_text(key, value, where=place)
        try:
            return cls(**read)
        except ConfigError as error:
            if not where:
                raise
            raise ConfigError(f"{where}: {error}", field=error.field, got=error.got, allowed=error.allowed) from None

    @classmethod
    def read_text(cls, name: str, text: str, *, where: str = "") -> Any:
        """Read what was typed for a field by the field's type; raises ConfigError."""
        field = cls.field(name)
        try:
            return read_text(text, _hints(cls)[name], _choices(field))
        except ValueError:
            expected = type_text(_hints(cls)[name])
            raise ConfigError(
                f"{where or cls.label()} {name}={text!r} is not {expected}",
                field=_dotted(cls, name),
                got=text,
                allowed=expected,
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values (tuples as lists, nested configs as dicts), ready for JSON."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def replace(self: C, **changes: Any) -> C:
        """Return a copy with some fields changed and everything checked again."""
        return type(self).from_dict({**{n: getattr(self, n) for n in self.field_names()}, **changes})

    @classmethod
    def label(cls) -> str:
        """Return the name of this config in errors, e.g. ``Mamba.Config``."""
        return cls.__qualname__


def read_text(text: str, hint: Any, choices: Sequence[Any] | None = None) -> Any:
    """Read typed text as a value of type ``hint``; raises ValueError where it is none.

    Text stays text for a type that holds ``str``: only ``null`` is None where the type allows None, and ``[a, b]`` is
    a list where it allows one. Numbers may be written ``1e6``, ``500k``, ``1M``; lists ``[a,b]`` or ``a,b``.
    """
    members = _members(hint)
    lists = [member for member in members if typing.get_origin(member) in (tuple, list)]
    textual = str in members or Path in members
    if types.NoneType in members and (text == "null" or (text.lower() in _NONE and not textual)):
        return None
    if choices and text in choices:
        return text
    if lists and (not textual or _bracketed(text)):
        return [_read_item(item, lists[0], index) for index, item in enumerate(split_list(text))]
    for member in members:
        literals = typing.get_args(member) if typing.get_origin(member) is typing.Literal else ()
        for literal in literals:
            if text == str(literal):
                return literal
    if textual:
        return text
    if any(isinstance(member, type) and issubclass(member, enum.Enum) for member in members):
        return text  # read, or refused with what is allowed, by the field
    if bool in members and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    for kind in (int, float):
        if kind in members:
            try:
                return _number(text, kind)
            except ValueError:
                continue
    if Any in members or any(_is_mapping(member) for member in members):
        return read_free(text)
    raise ValueError(text)


def read_free(text: str) -> Any:
    """Read typed text without a type: null, true, false, numbers, ``[lists]``, ``{mappings}``, and else the text.

    Raises ValueError for brackets that hold neither JSON nor YAML.
    """
    if text == "null":
        return None
    if text in ("true", "false"):
        return text == "true"
    if _bracketed(text) or (text.startswith("{") and text.endswith("}")):
        return _structure(text)
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_value(value: Any, hint: Any, where: str) -> Any:
    """Read a string as ``hint`` like :func:`read_text`, other values pass unchanged; raises ConfigError."""
    if not isinstance(value, str):
        return value
    try:
        return read_text(value, hint)
    except ValueError:
        expected = type_text(hint)
        raise ConfigError(f"{where}={value!r} is not {expected}", field=where, got=value, allowed=expected) from None


def spell(value: Any, hint: Any = Any) -> str:
    """Write a value so that :func:`read_text` reads it back by the same type; raises ConfigError where nothing does."""
    text = _spelled(value)
    try:
        same = plain(read_text(text, hint)) == plain(value)
    except ValueError:
        same = False
    if not same:
        raise ConfigError(f"{value!r} cannot be written as a setting of a command; choose another value", got=value)
    return text


def split_list(text: str) -> list[str]:
    """Split ``[Mx4, (ME)x2]`` at commas outside brackets and quotes; the outer brackets may be left out.

    Items come back as they stand, quotes included.
    """
    inner = text.strip()
    if _bracketed(inner):
        inner = inner[1:-1]
    parts = [""]
    for character, depth, quoted in _scanned(inner):
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    items = [part.strip() for part in parts]
    return [item for item in items if item]


def unquoted(item: str) -> str:
    """Return a list's item without the quotes around it."""
    if len(item) >= 2 and item[0] == item[-1] == '"':
        try:
            return str(json.loads(item))
        except ValueError:
            return item[1:-1]
    return item[1:-1].replace("''", "'") if len(item) >= 2 and item[0] == item[-1] == "'" else item


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, read by YAML 1.2: ``on`` and ``no`` are text, ``1e6`` is a number.

    Raises ConfigError for anything else.
    """
    import yaml

    try:
        node = _yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}", field=str(path)) from None
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path} must hold a mapping of settings, got {type(node).__name__}",
            field=str(path),
            got=type(node).__name__,
            allowed="a mapping",
        )
    return {str(key): value for key, value in node.items()}


def allowed_text(field: dataclasses.Field[Any]) -> str:
    """Return a field's allowed values in a few characters for a help text, such as ``>= 1`` or ``a | b``."""
    if field.metadata.get("choices"):
        return " | ".join(map(str, field.metadata["choices"]))
    bounds = [f"{word} {field.metadata[key]:g}" for key, word in _BOUNDS if field.metadata.get(key) is not None]
    return ", ".join(bounds)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: configs and mappings as dicts, tuples as lists, enums as their values."""
    if isinstance(value, FrozenConfig):
        return value.to_dict()
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, numbers.Integral):  # NumPy's numbers
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return value.value if isinstance(value, enum.Enum) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one of dotted names, ``{"a.b": value}``; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(config: type[FrozenConfig], field: dataclasses.Field[Any], given: Any) -> Any:
    """Return a field's value as its type has it; raises ConfigError."""
    hint = _hints(config)[field.name]
    name, where = _dotted(config, field.name), f"{config.label()} {field.name}={given!r}"
    choices, aliases = _choices(field), field.metadata.get("aliases") or {}
    if isinstance(given, (str, bool)) and choices:
        given = _chosen(given, choices, aliases)
    elif isinstance(given, (str, bool)):
        given = aliases.get(str(given).lower(), given)
    try:
        value = given if _fits(given, hint) else _converted(given, hint)
    except ConfigError as error:  # of a nested config
        inner = error.field or ""
        nested = inner if inner.startswith(f"{field.name}.") else f"{field.name}.{inner}"
        raise ConfigError(
            str(error), field=_dotted(config, nested.rstrip(".")), got=error.got, allowed=error.allowed
        ) from None
    except (ValueError, TypeError):
        expected = ", ".join([type_text(hint), *(repr(word) for word in aliases.values())])
        raise ConfigError(
            f"{where} must be {expected}, got {type(given).__name__}", field=name, got=given, allowed=expected
        ) from None
    for item in value if isinstance(value, tuple) else (value,):
        _check(field, item, where, name)
    return value


def _check(field: dataclasses.Field[Any], value: Any, where: str, name: str) -> None:
    """Raise ConfigError unless the value is one of the choices and within the bounds."""
    if value is None:
        return
    choices = field.metadata.get("choices")
    if choices and value not in choices:
        listed = ", ".join(map(str, choices))
        raise ConfigError(f"{where} must be one of {listed}", field=name, got=value, allowed=tuple(choices))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where} must be a finite number", field=name, got=value, allowed="a finite number")
        for key, word in _BOUNDS:
            bound = field.metadata.get(key)
            if bound is not None and not _HOLDS[key](value, bound):
                raise ConfigError(f"{where} must be {word} {bound}", field=name, got=value, allowed=f"{word} {bound}")


_BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="))
_HOLDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le}


# What is read from a class once: get_type_hints is slow, and configs are made by the thousand.
_HINTS: dict[type, dict[str, Any]] = {}
_NAMES: dict[type, tuple[str, ...]] = {}
_KINDS: dict[type, tuple[tuple[dataclasses.Field[Any], frozenset[type]], ...]] = {}


def _hints(cls: type) -> dict[str, Any]:
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def _names(cls: type[FrozenConfig]) -> tuple[str, ...]:
    if cls not in _NAMES:
        _NAMES[cls] = tuple(field.name for field in dataclasses.fields(cls))
    return _NAMES[cls]


def _plain_kinds(cls: type[FrozenConfig]) -> tuple[tuple[dataclasses.Field[Any], frozenset[type]], ...]:
    if cls not in _KINDS:
        _KINDS[cls] = _read_kinds(cls)
    return _KINDS[cls]


def _read_kinds(cls: type[FrozenConfig]) -> tuple[tuple[dataclasses.Field[Any], frozenset[type]], ...]:
    """Return each field with those of its types that need no conversion: text, numbers, yes or no, none."""
    found = []
    for field in dataclasses.fields(cls):
        members = set(_members(_hints(cls)[field.name]))
        kinds = {kind for kind in (int, float, str, bool, types.NoneType) if kind in members}
        if float in members:
            kinds.add(int)
        if field.metadata.get("choices") or field.metadata.get("aliases"):
            kinds -= {str, bool}  # further spellings are read as what they stand for
            if _choices(field) and str in members:
                kinds.add(str)
        found.append((field, frozenset(kinds)))
    return tuple(found)


def _plainly_allowed(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether a value of a plain kind is one of the choices and within the bounds, as :func:`_check` has it."""
    if value is None or type(value) is bool:
        return True
    about = field.metadata
    choices = about.get("choices")
    if choices and value not in choices:
        return False
    if type(value) is str:
        return True
    return math.isfinite(value) and all(
        about.get(key) is None or _HOLDS[key](value, about[key]) for key in ("ge", "gt", "le")
    )


def _unknown(cls: type[FrozenConfig], name: str, place: str) -> ConfigError:
    names = cls.field_names()
    return ConfigError(
        f"{place} has no field {name!r}{suggest(name, names)}", field=_dotted(cls, name), got=name, allowed=names
    )


def _dotted(cls: type[FrozenConfig], name: str) -> str:
    return f"{cls.prefix}.{name}" if cls.prefix else name


def _choices(field: dataclasses.Field[Any]) -> tuple[Any, ...] | None:
    choices: tuple[Any, ...] | None = field.metadata.get("choices")
    return choices if choices and all(isinstance(choice, str) for choice in choices) else None


def _chosen(given: str | bool, choices: Sequence[str], aliases: Mapping[str, str]) -> Any:
    """Return the choice that was meant: YAML 1.1 and scripts give true and false where the choices are on and off."""
    text = str(given).lower() if isinstance(given, bool) else given
    if text in choices:
        return text
    if text in aliases:
        return aliases[text]
    for group in (_TRUE, _FALSE):
        if text.lower() in group:
            return next((word for word in group if word in choices), given)
    return given


def _members(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _is_mapping(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, (Mapping, FrozenConfig))


def _expanded(value: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` as the user's home folder; raises ValueError for another user's that is unknown."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(value) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type as it stands."""
    for member in _members(hint):
        origin: Any = typing.get_origin(member) or member
        if member is Any or (not isinstance(origin, type) and origin is not typing.Literal):
            return True
        if origin is typing.Literal:
            if any(value == literal and type(value) is type(literal) for literal in typing.get_args(member)):
                return True
        elif isinstance(value, bool) and origin in (int, float):
            continue
        elif member is float and isinstance(value, int):
            return True
        elif origin is tuple:
            if isinstance(value, tuple) and _items_fit(value, typing.get_args(member)):
                return True
        elif isinstance(origin, type) and isinstance(value, origin):
            return True
    return False


def _items_fit(value: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return all(_fits(item, kinds[0]) for item in value)
    return not kinds or (len(kinds) == len(value) and all(map(_fits, value, kinds)))


def _converted(value: Any, hint: Any) -> Any:
    """Return a plain value as the first of the type's members that takes it; raises ValueError, TypeError."""
    members = _members(hint)
    if isinstance(value, str) and str not in members and Path not in members and isinstance(read_free(value), str):
        read = read_text(value, hint)  # '1M', 'yes': what YAML leaves as text; a quoted number stays text
        if not isinstance(read, str):
            return read if _fits(read, hint) else _converted(read, hint)
    for member in members:
        origin, items = typing.get_origin(member) or member, typing.get_args(member)
        if not isinstance(origin, type):
            continue
        if issubclass(origin, FrozenConfig) and isinstance(value, Mapping):
            return origin.from_dict(value)
        if issubclass(origin, enum.Enum) and isinstance(value, str):
            return origin(value)
        if origin is Path and isinstance(value, (str, os.PathLike)):
            return _expanded(value)
        if origin is tuple:
            many = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if not items:
                return tuple(many)
            kinds = [items[0]] * len(many) if len(items) == 2 and items[1] is Ellipsis else list(items)
            if len(kinds) != len(many):
                raise ValueError(value)
            return tuple(
                item if _fits(item, kind) else _converted(item, kind) for item, kind in zip(many, kinds, strict=True)
            )
        if isinstance(value, bool):
            continue
        if origin is int and isinstance(value, numbers.Integral):
            return int(value)
        if origin is int and isinstance(value, numbers.Real) and float(value).is_integer():
            return int(float(value))
        if origin is float and isinstance(value, numbers.Real):
            return float(value)
    raise TypeError(value)


def type_text(hint: Any) -> str:
    """Return a type in plain words, as errors and help texts name it."""
    names = {
        Path: "a path",
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        types.NoneType: "none",
    }
    kinds = []
    for member in _members(hint):
        origin, items = typing.get_origin(member), typing.get_args(member)
        if origin is typing.Literal:
            kinds.append(f"one of {', '.join(map(str, items))}")
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            kinds.append(f"one of {', '.join(str(entry.value) for entry in member)}")
        elif origin in (tuple, list):
            kinds.append(
                f"a list of {type_text(items[0]).removeprefix('an ').removeprefix('a ')}" if items else "a list"
            )
        elif origin is not None and _is_mapping(member):
            kinds.append("a mapping")
        else:
            kinds.append(names.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(kinds)


def _number(text: str, kind: type) -> Any:
    """Read a number with an optional suffix k, M, G or T, exactly; raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if kind is float:
        return float(match[1]) * _SUFFIXES[match[2]] if match else float(text)
    if match is None:
        return int(text)
    value = Fraction(match[1].replace("_", "")) * _SUFFIXES[match[2]]
    if value.denominator != 1:
        raise ValueError(text)
    return int(value)


def _bracketed(text: str) -> bool:
    """Whether the first bracket of ``[...]`` is closed by the last character."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depths = [depth for _, depth, _ in _scanned(text)]
    return depths.index(0) == len(text) - 1 if 0 in depths else False


def _scanned(text: str) -> Iterator[tuple[str, int, bool]]:
    """Yield each character with the depth of brackets after it, and whether it stands in quotes.

    A quote opens where an item begins; an apostrophe within a word is a character like any other.
    """
    depth, quote, escaped, fresh = 0, "", False, True
    for character in text:
        if quote:
            yield character, depth, True
            closes = character == quote and not escaped
            escaped = character == "\\" and quote == '"' and not escaped
            quote = "" if closes else quote
            continue
        if character in "\"'" and fresh:
            quote = character
        depth += (character in "[{(") - (character in "]})")
        fresh = character in "[{(,:" or (fresh and character.isspace())
        yield character, depth, bool(quote)


def _read_item(item: str, hint: Any, index: int) -> Any:
    items = typing.get_args(hint)
    kind = (
        Any
        if not items
        else items[0]
        if len(items) == 2 and items[1] is Ellipsis
        else items[min(index, len(items) - 1)]
    )
    return unquoted(item) if str in _members(kind) else read_text(unquoted(item) if kind is not Any else item, kind)


def _spelled(value: Any) -> str:
    value = plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(_quoted(item) for item in value)}]"
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _quoted(item: Any) -> str:
    """Write an item of a list: text that would be read as something else, or not as one item, stands in quotes."""
    text = _spelled(item)
    if not isinstance(item, str):
        return text
    simple = text and text == text.strip() and read_free(text) == text and not set(text) & set("[](){},\"'")
    return text if simple else json.dumps(text, ensure_ascii=False)


def _structure(text: str) -> Any:
    """Read a list or mapping as JSON, else as YAML; raises ValueError."""
    import yaml

    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error


def _yaml(text: str) -> Any:
    """Read YAML with the plain scalars of YAML 1.2; raises yaml.YAMLError."""
    import yaml

    return yaml.load(text, _loader())


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader in which ``on``, ``no`` and ``1_000`` are text and ``1e6`` is a number."""

    tag = "tag:yaml.org,2002:"
    Loader.yaml_implicit_resolvers = {
        first: [(name, pattern) for name, pattern in rules if name in (f"{tag}null", f"{tag}merge")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    for name, pattern, first in (
        ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
        ("float", rf"^(?:{digits}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+0123456789."),
    ):
        Loader.add_implicit_resolver(tag + name, re.compile(pattern), list(first))
    Loader.add_constructor(f"{tag}int", lambda loader, node: int(str(node.value)))
    return Loader
