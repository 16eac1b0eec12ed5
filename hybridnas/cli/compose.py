"""From ``key=value`` to a command's settings: Hydra merges the named choices, dataclass fields read what was typed.

Groups (``space data budget preset suite experiment``) are choices with names. Their values, an experiment's and the
defaults of the command's dataclass go to Hydra as nodes of its ConfigStore, and Hydra composes them. What the user
typed never meets Hydra's grammar: the type of the setting's field decides how it is read (``config.read_text``), so
that paths, prompts and patterns are text whatever they look like. ``${...}`` is resolved in YAML files alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from hybridnas.cli.command import Command, groups_of, settings_class
from hybridnas.cli.sections import (
    OPEN,
    choice_of,
    choices_of,
    hint_of,
    known_settings,
    no_setting,
    read_choices,
    section_class,
)
from hybridnas.config import FrozenConfig, plain, read_text, spell, type_text
from hybridnas.errors import ConfigError, suggest

# Commands whose first arguments may stand without their keys: 'bench scan' is 'bench suite=scan'.
FIRST_ARGUMENTS = {"bench": ("suite",), "search": ("action",), "new": ("kind", "name"), "data": ("action",)}

NAMES = (("compare", "study"),)  # texts that hold several names


def read_settings(command: str, overrides: Sequence[str]) -> Command:
    """Return a command's settings; raises ConfigError that says what is allowed."""
    return settings_class(command).from_dict(compose(command, overrides))


def compose(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return a command's settings as plain values, groups as mappings; raises ConfigError."""
    settings = settings_class(command)
    groups = groups_of(settings)
    given = split_overrides(command, overrides)
    chosen = {key: _chosen(command, key, text, groups[key]) for key, text in given if key in groups}
    values = _composed(command, settings, chosen)
    for key in values:  # an experiment's file may hold what nobody would read
        if key not in settings.field_names():
            raise no_setting(command, key, list(known_settings(settings, values)))
    if chosen.get("experiment"):
        values["experiment"] = {"name": chosen["experiment"]}
    typed = [(key, text) for key, text in given if key not in groups]
    _refuse_repeated_lists(command, settings, typed)
    for key, text in sorted(typed, key=lambda item: not item[0].endswith(".kind")):  # a kind decides on other fields
        _set(command, settings, values, key, text)
    return values


def _refuse_repeated_lists(command: str, settings: type[FrozenConfig], given: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigError for a list that is given twice: the second one would silently replace the first."""
    for key in dict.fromkeys(key for key, _ in given):
        texts = [text for name, text in given if name == key]
        typed = get_origin(settings.type_of(key)) if key in settings.field_names() else None
        if len(texts) > 1 and (typed is tuple or (command, key) in NAMES):
            together = f"{key}=[{','.join(text.strip('[]') for text in texts)}]"
            raise ConfigError(
                f"{command} {key} is given {len(texts)} times; write {together}", field=key, got=texts, allowed=together
            )


def split_overrides(command: str, overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Return (key, text) of each ``key=value``; raises ConfigError for anything else."""
    overrides = list(overrides)
    for place, key in enumerate(FIRST_ARGUMENTS.get(command, ())[: len(overrides)]):
        if not re.fullmatch(r"[\w,]+", overrides[place]):
            break
        overrides[place] = f"{key}={overrides[place]}"
    pairs = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.lstrip("+")
        if not equals or not re.fullmatch(r"[\w.]+", key):
            raise ConfigError(
                f"{command} takes key=value settings, got {override!r}; see python -m hybridnas.{command} --help",
                got=override,
                allowed="key=value",
            )
        pairs.append((key, text))
    return pairs


def command_line(command: str, settings: Command) -> list[str]:
    """Return the ``key=value`` settings that read as these: named choices first, then what differs from them.

    Raises ConfigError for settings that no command line can hold.
    """
    values = settings.to_dict()
    experiment = values.get("experiment")
    choices = [f"experiment={experiment['name']}"] if experiment else []
    for group in groups_of(type(settings)):
        name = str((values.get(group) or {}).get("kind" if group == "data" else "name"))
        if group != "experiment" and name in choices_of(group):
            choices.append(f"{group}={name}")
    usual = read_settings(command, choices).to_dict()
    changed = []
    for path, value in _leaves(values):
        if _at(usual, path) != value and path[0] != "experiment":
            hint, _ = _hint(type(settings), values, path)
            changed.append(f"{'.'.join(path)}={spell(value, hint)}")
    if read_settings(command, [*choices, *changed]) != settings:
        raise ConfigError(f"these settings of {command} cannot be written on a command line; put them into a YAML file")
    return choices + changed


def _chosen(command: str, group: str, name: str, default: str | None) -> str | None:
    """Return the choice of a group; raises ConfigError for one that does not exist."""
    if name in ("", "null"):
        if default is not None:
            raise ConfigError(
                f"{command} needs its {group}, e.g. {group}={default}",
                field=group,
                got=name,
                allowed=tuple(choices_of(group)),
            )
        return None
    names = choices_of(group)
    if name in names:
        return name
    listed = f" (options: {', '.join(names)})" if names else f": there is no ./{group}s/{name}.yaml here"
    hint = suggest(name, names).partition("; allowed")[0]
    if group == "data" and ("/" in name or Path(name).suffix or Path(name).exists()):
        hint, listed = f"; did you mean data=text data.path={name}?", ""
    raise ConfigError(f"{command} {group}={name} is unknown{hint}{listed}", field=group, got=name, allowed=tuple(names))


def _composed(command: str, settings: type[FrozenConfig], chosen: Mapping[str, str | None]) -> dict[str, Any]:
    """Let Hydra merge defaults, choices and experiment, in this order; raises ConfigError."""
    wanted = groups_of(settings)
    own: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        if "group" not in field.metadata:
            value = field.default_factory() if callable(field.default_factory) else field.default
            own[field.name] = plain(value)
    if not any({**wanted, **chosen}.values()):  # nothing to merge: Hydra takes a quarter of a second to import
        return own

    from hydra import compose as hydra_compose
    from hydra import initialize
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    defaults: list[Any] = ["_self_", *({group: name} for group, name in wanted.items())]
    store.store(name=command, node={"defaults": defaults, **own})
    anew: dict[str, str | None] = {}
    if chosen.get("experiment"):
        name = str(chosen["experiment"])
        experiment = _experiment(name)
        store.store(group="experiment", name=name, node=experiment, package="_global_")
        anew = _overridden(experiment)
        other = ", ".join(sorted(set(anew) - set(wanted)))
        if other:
            raise ConfigError(
                f"experiment={name} chooses {other}, which {command} does not have",
                field="experiment",
                got=name,
            )
        wanted |= {group: _chosen(command, group, choice or "", None) for group, choice in anew.items()}
    wanted |= chosen
    for group, option in wanted.items():
        if group != "experiment" and option is not None:
            store.store(group=group, name=option, node=choice_of(group, option))
    overrides = [f"{group}={_literal(name)}" for group, name in wanted.items() if name is not None]
    overrides += [f"~{group}" for group in chosen if chosen[group] is None and group in anew]
    GlobalHydra.instance().clear()
    with initialize(config_path=None, version_base="1.3"):  # everything lies in the ConfigStore
        try:
            composed = OmegaConf.to_container(hydra_compose(command, overrides=overrides), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"{command} cannot compose its settings: {' '.join(str(error).split())}") from None
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}


def _experiment(name: str) -> dict[str, Any]:
    """Return an experiment's file with the choices of its defaults list as text."""
    node = choice_of("experiment", name)
    if "defaults" in node:
        node["defaults"] = [
            {str(key): None if value is None else str(value) for key, value in entry.items()}
            if isinstance(entry, dict)
            else entry
            for entry in node["defaults"]
        ]
    return node


def fitting_experiments(command: str) -> list[str]:
    """Return the experiments that this command can take: those that choose no group and no setting it does not have."""
    settings, found = settings_class(command), []
    for name in choices_of("experiment"):
        try:
            node = _experiment(name)
        except ConfigError:  # a broken file is reported where it is asked for
            continue
        if {*_overridden(node), *node} - {"defaults"} <= set(settings.field_names()):
            found.append(name)
    return found


def _overridden(experiment: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the groups that an experiment's defaults list chooses anew."""
    entries = [entry for entry in experiment.get("defaults", ()) if isinstance(entry, dict)]
    return {key.partition("/")[2]: value for entry in entries for key, value in entry.items() if "override" in key}


def _literal(name: str) -> str:
    """Write a choice's name for Hydra, as quoted text: '1e3' and 'true' are names like any other."""
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _set(command: str, settings: type[FrozenConfig], values: dict[str, Any], key: str, text: str) -> None:
    """Read what was typed for a setting by its type, and put it into the values; raises ConfigError."""
    path = _path(key)
    if path[0] in groups_of(settings) and values.get(path[0]) is None and len(path) > 1:
        names = choices_of(path[0])
        example = next(iter(names), "NAME")
        raise ConfigError(
            f"{command} {key} needs a {path[0]}, e.g. {path[0]}={example}", field=path[0], allowed=tuple(names)
        )
    try:
        hint, choices = _hint(settings, values, path)
        if path[0] == "space" and len(path) == 2:
            value = read_choices(text)
        else:
            value = read_text(text, hint, choices)
    except KeyError:
        raise no_setting(command, key, list(known_settings(settings, values))) from None
    except ValueError:
        expected = type_text(hint)
        raise ConfigError(
            f"{command} {key}={text!r} is not {expected}", field=key, got=text, allowed=expected
        ) from None
    node: Any = values
    for name in path[:-1]:
        inner = node.get(name)
        if isinstance(inner, list):  # data.parts=[mqar,parity]: names, each with settings of its own
            inner = {str(item): {} for item in inner}
        node[name] = inner if isinstance(inner, dict) else {}
        node = node[name]
    node[path[-1]] = value


def _hint(settings: type[FrozenConfig], values: Mapping[str, Any], path: list[str]) -> tuple[Any, Any]:
    """Return type and choices of a setting; raises KeyError for one that does not exist."""
    name = path[0]
    if name not in settings.field_names():
        raise KeyError(name)
    if len(path) == 1:
        return settings.type_of(name), settings.field(name).metadata.get("choices")
    section = values.get(name)
    section = section if isinstance(section, Mapping) else {}
    if name not in OPEN and section_class(name, section) is None and name not in groups_of(settings):
        raise KeyError(name)
    return hint_of(name, path[1:], section)


def _path(key: str) -> list[str]:
    """Return the keys that a dotted setting stands for; ``space.E.top_k`` is the space's choice ``E.top_k``."""
    path = key.split(".")
    if path[0] == "space" and len(path) > 2 and len(path[1]) == 1 and path[1].isupper():
        return ["space", ".".join(path[1:])]
    return path


def _leaves(node: Mapping[str, Any], before: tuple[str, ...] = ()) -> list[tuple[list[str], Any]]:
    """Return (path, value) of everything that is no mapping with entries."""
    leaves: list[tuple[list[str], Any]] = []
    for key, value in node.items():
        if isinstance(value, Mapping) and value and all(re.fullmatch(r"[\w.]+", str(name)) for name in value):
            leaves += _leaves(value, (*before, key))
        else:
            leaves.append(([*before, key], value))
    return leaves


def _at(node: Any, path: Sequence[str]) -> Any:
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
