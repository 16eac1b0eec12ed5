"""Hydra, used for composition alone: YAML groups and ``key=value`` overrides in, one plain dict out.

Groups: ``data`` and ``budget`` are folders of conf/; ``preset`` and ``suite`` are registries; ``space`` and
``experiment`` are YAML files, the package's own and those in ``./search_spaces`` and ``./experiments`` of the folder
where the user stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridnas.config import read_yaml
from hybridnas.errors import ConfigError, suggest

CONF = Path(__file__).resolve().parents[1] / "conf"
# Values that are text whatever they look like: Hydra's grammar would trip over '(ME)x8', '[M,E]' or a prompt, so these
# settings are taken as they stand and Hydra never sees them.
TEXT = (
    *("pattern", "prompt", "out", "model", "study", "storage", "tracking", "run", "baseline", "uri", "runs"),
    "against",
    *("data.path", "data.name", "data.config", "data.split", "data.revision", "data.text_field", "data.separator"),
    *("data.tokenizer", "data.cache_dir", "suite"),
    *("patterns", "suite.out", "suite.runs", "suite.against"),
)
# Commands whose first word may stand without its key: 'bench scan' is 'bench suite=scan'.
FIRST_WORD = {"bench": "suite", "search": "action"}


def compose(command: str, overrides: list[str]) -> dict[str, Any]:
    """Return the settings of a command with the user's overrides; raises ConfigError that lists what is allowed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if command in FIRST_WORD and overrides and re.fullmatch(r"[\w,]+", overrides[0]):
        overrides = [f"{FIRST_WORD[command]}={overrides[0]}", *overrides[1:]]
    _check_form(command, overrides)
    texts, overrides = _taken_apart(overrides, _groups_of(command))
    _store_groups(overrides)
    GlobalHydra.instance().clear()
    with initialize_config_module("hybridnas.conf", version_base="1.3"):
        try:
            config = hydra_compose(command, overrides=overrides)
            plain = OmegaConf.to_container(config, resolve=True)
        except (HydraException, OmegaConfBaseException, OSError, TypeError) as error:
            raise _in_our_words(command, overrides, error) from None
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    own = _own_settings(command)
    for key in settings:  # Hydra lets '+key' and experiment files add what nobody would read
        if key not in own:
            raise ConfigError(f"{command} has no setting {key!r}{suggest(key, own)}")
    for key, text in texts.items():
        _set(command, settings, key, text)
    if isinstance(settings.get("preset"), dict) and "name" not in settings["preset"]:
        raise ConfigError(f"{command} preset.{next(iter(settings['preset']))} needs a preset, e.g. preset=moe_mamba")
    if "suite" in _groups_of(command) and isinstance(settings.get("suite"), dict) and "name" not in settings["suite"]:
        raise ConfigError(f"{command} suite.{next(iter(settings['suite']))} needs a suite, e.g. suite=mad")
    return settings


def help_text(command: str, summary: str) -> str:
    """Return a command's help: its groups with their options, and every setting with its default."""
    text = (CONF / f"{command}.yaml").read_text()
    groups = _groups_of(command)
    lines = [f"python -m hybridnas.{command} [key=value ...]", "", summary[0].upper() + summary[1:] + ".", ""]
    if groups:
        lines.append("groups (key=option):")
        lines += [f"  {name:<11} {', '.join(_options(name))}" for name in groups]
        lines.append("")
    lines.append("settings and their defaults:")
    body = [line for line in text.splitlines() if not line.startswith(("defaults:", "  - "))]
    lines += [f"  {line}" for line in body if line.strip()]
    return "\n".join(lines)


# Mappings that take keys they do not have yet; whoever reads them checks the keys, with better words than Hydra's.
OPEN = ("arch.", "space.", "preset.", "budget.", "data.", "suite.")


def _groups() -> tuple[str, ...]:
    return ("preset", "space", "data", "budget", "suite", "experiment")


def _defaults(command: str) -> dict[str, Any]:
    """Return the groups of a command, each with the option that is taken unasked."""
    entries = read_yaml(CONF / f"{command}.yaml").get("defaults", [])
    return {key: value for entry in entries if isinstance(entry, dict) for key, value in entry.items()}


def _groups_of(command: str) -> list[str]:
    return [name for name in _groups() if name in _defaults(command)]


def _own_settings(command: str) -> list[str]:
    """Return the names of a command's settings and groups."""
    return [key for key in read_yaml(CONF / f"{command}.yaml") if key != "defaults"] + _groups_of(command)


def _check_form(command: str, overrides: list[str]) -> None:
    """Refuse what is not ``key=value``, and an option that a group lacks, before Hydra finds harder words for it."""
    defaults = _defaults(command)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key.startswith("~") or not key.strip("+"):
            raise ConfigError(
                f"{command} takes key=value settings, got {override!r}; see python -m hybridnas.{command} --help"
            )
        group = key.lstrip("+")
        if group not in defaults:
            continue
        if value in ("", "null"):
            if defaults[group] is not None:
                raise ConfigError(f"{command} needs its {group}, e.g. {group}={defaults[group]}")
        elif value not in (options := _options(group)):
            listed = f" (options: {', '.join(options)})" if options else f": there is no ./{group}s/{value}.yaml here"
            raise ConfigError(f"{command} {group}={value} is unknown{suggest(value, options)}{listed}")


def _options(group: str) -> list[str]:
    if group in ("data", "budget"):
        return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if group == "preset":
        from hybridnas.arch.presets import list_presets

        return sorted(list_presets())
    if group == "suite":
        from hybridnas.suites.suite import SUITES

        return list(SUITES)
    return sorted(_files(group))


def _files(group: str) -> dict[str, Path]:
    """Return option -> file of a group of YAML files; a user's own file wins over ours."""
    rooms = {
        "space": [CONF.parent / "search_spaces", Path("search_spaces")],
        "experiment": [Path("experiments")],
    }[group]
    return {path.stem: path for room in rooms for path in sorted(room.glob("*.yaml"))}


def _store_groups(overrides: list[str]) -> None:
    """Tell Hydra of presets, spaces and experiments; a broken file matters only where it is asked for."""
    from hydra.core.config_store import ConfigStore

    from hybridnas.arch.presets import list_presets, preset_arguments

    store = ConfigStore.instance()
    for name in list_presets():
        store.store(group="preset", name=name, node={"name": name, **preset_arguments(name)})
    for name in _options("suite"):
        store.store(group="suite", name=name, node=_suite_settings(name))
    for group in ("space", "experiment"):
        package = "_global_" if group == "experiment" else None
        for name, path in _files(group).items():
            try:
                node = read_yaml(path)
            except ConfigError:
                if f"{group}={name}" in overrides:
                    raise
                continue
            store.store(group=group, name=name, node={"name": name, **node} if not package else node, package=package)


def _suite_settings(name: str) -> dict[str, Any]:
    from hybridnas.suites.suite import SuiteConfig

    return {key: [] if value == () else value for key, value in SuiteConfig(name=name).to_dict().items()}


def _taken_apart(overrides: list[str], groups: list[str]) -> tuple[dict[str, str], list[str]]:
    """Separate what is plain text from what Hydra reads."""
    texts: dict[str, str] = {}
    rest: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.lstrip("+") in TEXT and key not in groups and value not in ("", "null"):
            texts[key.lstrip("+")] = value
        else:
            texts.pop(key.lstrip("+"), None)  # the last one counts, also when it takes a text back
            rest.append(f"++{override}" if key.startswith(OPEN) else override)
    return texts, rest


def _set(command: str, settings: dict[str, Any], dotted: str, text: str) -> None:
    *path, last = dotted.split(".")
    node: Any = settings
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or (last not in node and not dotted.startswith(OPEN)):
        raise _no_setting(command, dotted, list(_dotted(settings)))
    node[last] = text


def _in_our_words(command: str, overrides: list[str], error: Exception) -> ConfigError:
    text = str(error)
    missing = re.search(r"Could not find '(\w+)/([^']+)'", text)
    if missing:
        group, got = missing.groups()
        return ConfigError(f"{command} {group}={got} is unknown{suggest(got, _options(group))} (options: "
                           f"{', '.join(_options(group))})")  # fmt: skip
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if unknown:
        key = unknown.group(1)
        return _no_setting(command, key, _settings(command, overrides))
    first = " ".join(text.split("See https")[0].split())
    several = re.search(r"Ambiguous value for argument '\+*([^=']+)=([^']*)'", text)
    if several:
        key, value = several.groups()
        return ConfigError(f"{command} {key}={value} is no single value; write a list as '{key}=[{value}]'")
    return ConfigError(f"{command} cannot read its settings: {first}")


def _no_setting(command: str, key: str, known: list[str]) -> ConfigError:
    """Name what may have been meant: a setting beside it (data.path and data.kind), else any."""
    room = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == room] if room else []
    return ConfigError(f"{command} has no setting {key!r}{suggest(key, beside or known)}")


def _settings(command: str, overrides: list[str]) -> list[str]:
    """Every dotted key that exists with the groups that the user chose: what a mistyped key may have meant."""
    chosen = [item for item in overrides if item.partition("=")[0] in _groups()]
    try:
        return list(_dotted(compose(command, chosen)))
    except ConfigError:
        return []


def _dotted(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield prefix + str(key)
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
