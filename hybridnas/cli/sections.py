"""Settings with a dot: which fields ``budget.*``, ``data.*``, ``train.*`` and the like have, and which choices groups.

A section is described by the dataclass that reads it, so that types, defaults and help come from its fields. Three are
open, since what they may hold depends on blocks: ``arch.*``, ``preset.*`` and ``space.*``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybridnas.config import FrozenConfig, allowed_text, plain, read_free, read_yaml, split_list, unquoted
from hybridnas.errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
OPEN = ("arch", "preset", "space")
EXPERIMENTS = (PACKAGE / "experiments", Path("experiments"))  # a user's own file wins over the package's


def section_class(section: str, values: Mapping[str, Any]) -> type[FrozenConfig] | None:
    """Return the dataclass whose fields a section has; None for one that is open, or data of an unknown kind."""
    if section == "budget":
        from hybridnas.search.config import Budget

        return Budget
    if section == "train":
        from hybridnas.train.config import TrainConfig

        return TrainConfig
    if section == "suite":
        from hybridnas.suites.suite import SuiteConfig

        return SuiteConfig
    if section == "data":
        from hybridnas.data import SOURCES

        kind = str(values.get("kind", "stdlib"))
        return SOURCES.get(kind).config if kind in SOURCES else None
    return None


def choices_of(group: str) -> list[str]:
    """Return the names that a group's choice may have."""
    if group == "data":
        from hybridnas.data import SOURCES

        return sorted(SOURCES)
    if group == "preset":
        from hybridnas.arch.presets import list_presets

        return sorted(list_presets())
    if group == "suite":
        from hybridnas.suites.suite import SUITES

        return sorted(SUITES)
    if group == "space":
        from hybridnas.search_spaces.listing import list_spaces

        return list_spaces()
    if group == "budget":
        from hybridnas.search.named import list_budgets

        return list_budgets()
    return sorted(experiment_files())


def experiment_files() -> dict[str, Path]:
    """Return experiment -> file."""
    return {path.stem: path for folder in EXPERIMENTS for path in sorted(folder.glob("*.yaml"))}


def choice_of(group: str, name: str) -> dict[str, Any]:
    """Return the values that a choice stands for; raises ConfigError for a file that cannot be read."""
    if group == "data":
        # The kind's defaults are its dataclass's; mappings are written out, so that their entries can be changed.
        config = section_class("data", {"kind": name})
        assert config is not None
        made = {
            field.name: plain(field.default_factory())
            for field in dataclasses.fields(config)
            if field.default_factory is not dataclasses.MISSING
        }
        return {"kind": name, **made}
    if group in ("preset", "suite"):
        return {"name": name}
    if group == "space":
        from hybridnas.search_spaces.listing import space_settings

        return space_settings(name)
    if group == "budget":
        from hybridnas.search.named import named_budget

        return named_budget(name)
    return read_yaml(experiment_files()[name])


def hint_of(section: str, path: list[str], values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return type and choices of a setting within a section, ``values`` being the section so far.

    Raises KeyError for a setting that does not exist.
    """
    name = path[0]
    if section in OPEN:
        return _open_hint(section, path), None
    config = section_class(section, values)
    if config is None:
        return Any, None
    if section == "data" and name == "parts" and len(path) > 1 and "parts" in config.field_names():
        if len(path) == 2:
            return Mapping, None
        if path[2:] == ["weight"]:
            return int, None
        parts = values.get("parts")
        part = parts.get(path[1]) if isinstance(parts, Mapping) else None
        return hint_of("data", path[2:], {"kind": path[1], **(part if isinstance(part, Mapping) else {})})
    if name not in config.field_names():
        raise KeyError(name)
    field = config.field(name)
    if len(path) > 1:
        return Any, None
    return config.type_of(name), field.metadata.get("choices")


def _open_hint(section: str, path: list[str]) -> Any:
    """Return the type of a field of blocks or of the model where the name says it, else Any."""
    if section == "space":
        return Any
    from hybridnas.arch.arch import ModelConfig
    from hybridnas.registry import BLOCKS

    configs: list[type[FrozenConfig]] = [ModelConfig, *(BLOCKS.get(letter).Config for letter in BLOCKS)]
    if len(path) == 2 and path[0] in BLOCKS:
        configs = [BLOCKS.get(path[0]).Config]
    found = [config.type_of(path[-1]) for config in configs if path[-1] in config.field_names()]
    return found[0] if found and all(hint == found[0] for hint in found) else Any


def read_choices(text: str) -> Any:
    """Read a setting of a space: one value, or a list ``[M,[M,E]]`` whose bracketed items are patterns."""
    items = split_list(text)
    if not (text.startswith("[") and text.endswith("]")) and len(items) < 2:
        return read_free(text)
    return [item if item.startswith("[") else unquoted(item) if item[0] in "\"'" else read_free(item) for item in items]


def known_settings(settings: type[FrozenConfig], values: Mapping[str, Any]) -> Iterator[str]:
    """Yield every dotted setting that exists with the choices made: what a mistyped one may have meant."""
    for name in settings.field_names():
        yield name
        section = values.get(name)
        if name == "arch":
            from hybridnas.arch.arch import ModelConfig

            yield from (f"arch.{field}" for field in ModelConfig.field_names())
            continue
        yield from (f"{name}.{key}" for key, _, _, _ in entries(name, section if isinstance(section, Mapping) else {}))


def entries(section: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, str]]:
    """Yield (name, value, meaning, allowed values) of each field of a section, the values as they stand."""
    config = section_class(section, values)
    if config is not None:
        for field in dataclasses.fields(config):
            own = field.metadata.get("kinds")
            if (field.name in ("kind", "name") and field.name in values) or (own and values.get("kind") not in own):
                continue
            default = field.default_factory() if callable(field.default_factory) else field.default
            default = None if default is dataclasses.MISSING else default
            yield field.name, plain(values.get(field.name, default)), field.metadata["doc"], allowed_text(field)
    elif section == "preset" and "name" in values:
        from hybridnas.arch.presets import preset_arguments

        for name, default in preset_arguments(str(values["name"])).items():
            yield name, values.get(name, default), "a size of the preset; null: derived from the others", ">= 1"
    elif section == "space":
        for name, value in values.items():
            if name not in ("name", "description", "table"):
                yield name, value, "", ""


def no_setting(command: str, key: str, known: list[str]) -> ConfigError:
    """Return the error for a setting that does not exist: the same name in a section, else a close name beside it."""
    from difflib import get_close_matches

    section, dot, last = key.rpartition(".")
    elsewhere = [name for name in known if name.endswith(f".{last}")]
    beside = {name[len(section) + bool(dot) :]: name for name in known if name.rpartition(".")[0] == section}
    if not beside:  # the section itself is unknown
        beside = {name: name for name in known if "." not in name}
        last = section or last
    close = get_close_matches(last, beside, n=1, cutoff=0.6)
    if elsewhere and not (close and section):  # of a name without a section the same name in one is nearer
        hint = f"; did you mean {' or '.join(map(repr, elsewhere[:2]))}?"
    elif close:
        hint = f"; did you mean {beside[close[0]]!r}?"
    else:
        hint = f"; allowed: {', '.join(beside.values())}"
    return ConfigError(f"{command} has no setting {key!r}{hint}", field=key, got=key, allowed=tuple(beside.values()))
