"""What a space may choose for a block's field: one of several values, or a number of a range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, Union

from hybridnas.errors import ConfigError

Value: TypeAlias = Union[str, int, float, bool, None]  # noqa: UP007 - evaluated at run time, also by Python 3.10


class Chooser(Protocol):
    """What a space needs of a sampler's trial; an ``optuna.Trial`` fits."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float: ...


@dataclass(frozen=True)
class Options:
    """One of several values; a single one is fixed and asks no sampler."""

    values: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a field must allow: all of them."""
        return self.values

    def draw(self, chooser: Chooser, name: str) -> Any:
        """Ask for a value, unless there is but one."""
        return self.values[0] if len(self.values) == 1 else chooser.suggest_categorical(name, list(self.values))


@dataclass(frozen=True)
class Range:
    """A number from ``low`` to ``high`` in steps of ``step``; whole numbers where all three are."""

    low: float
    high: float
    step: float

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a field must allow: the least and the greatest."""
        return (self.low, self.high)

    def draw(self, chooser: Chooser, name: str) -> Any:
        """Ask for a number."""
        value = chooser.suggest_float(name, self.low, self.high, step=self.step)
        whole = all(isinstance(number, int) for number in (self.low, self.high, self.step))
        return round(value) if whole else round(value, 6)


Choice: TypeAlias = Union[Options, Range]  # noqa: UP007


def read_choice(given: Any, where: str, field: str) -> Choice:
    """Read a choice as YAML gives it: a value, a list of values, or ``{low: 1, high: 8, step: 1}``.

    ``where`` opens the message and ``field`` is the setting's dotted name; raises ConfigError.
    """
    if isinstance(given, (Options, Range)):
        return given
    if isinstance(given, Mapping):
        return _read_range(given, where, field)
    values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    if not values:
        raise ConfigError(f"{where} has an empty list of choices; give at least one value", field=field, got=given)
    for value in values:
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise ConfigError(
                f"{where} has the choice {value!r}; each must be a number, text, true, false or null",
                field=field,
                got=value,
                allowed="a number, text, true, false or null",
            )
    return Options(values)


def _read_range(given: Mapping[str, Any], where: str, field: str) -> Range:
    keys = ("low", "high", "step")
    shown = dict(given)
    if set(given) != set(keys):
        raise ConfigError(
            f"{where} as a range needs low, high and step, got {shown}", field=field, got=shown, allowed=keys
        )
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in given.values()):
        raise ConfigError(f"{where} as a range needs numbers, got {shown}", field=field, got=shown, allowed="numbers")
    if not given["low"] <= given["high"] or given["step"] <= 0:
        raise ConfigError(
            f"{where} needs low <= high and step > 0, got {shown}",
            field=field,
            got=shown,
            allowed="low <= high and step > 0",
        )
    return Range(given["low"], given["high"], given["step"])
