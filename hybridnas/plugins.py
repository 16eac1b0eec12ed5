"""Plugins of a working folder: ``blocks/NAME.py`` and ``tasks/NAME.py``, Python files that register blocks and tasks.

They run whatever they hold, so nothing loads them by itself: commands do with ``plugins=true``, Python with
:func:`load_plugins`. A file that fails is left out with one sentence and the others go on. A study keeps the SHA-256 of
the files that its space and its data need, see :func:`used_by`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridnas.errors import ConfigError, HybridNASError, StudyError
from hybridnas.registry import PLUGINS, Registry, recording

KINDS = {"blocks": "block letter", "tasks": "data"}  # folder -> kind of the registry that its files fill
_PACKAGE = Path(__file__).resolve().parent
_log = logging.getLogger("hybridnas.plugins")


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A file that was loaded."""

    name: str  # below the folder, e.g. blocks/my_mixer.py
    path: Path  # absolute, without links
    sha256: str
    registers: tuple[tuple[str, str], ...]  # (kind of registry, key)

    @property
    def words(self) -> str:
        """Return the file and what it registers, for people."""
        return f"{self.name} ({', '.join(f'{kind} {key}' for kind, key in self.registers)})"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What :func:`load_plugins` did."""

    plugins: tuple[Plugin, ...] = ()  # of this folder, those loaded by an earlier call included
    failed: Mapping[str, str]  # file -> one sentence with line and cause

    @property
    def words(self) -> str:
        """Return one line for people."""
        if not self.plugins:
            return "plugins: none loaded"
        return f"plugins: {', '.join(plugin.words for plugin in self.plugins)}"


_LOADED: dict[Path, Plugin] = {}
_FAILED: set[Path] = set()  # files that were left out, which their warnings say


def plugin_files(folder: str | Path = ".") -> dict[str, Path]:
    """Return name -> file of a folder's plugins, as ``blocks/my_mixer.py``, whether loaded or not.

    Files of this package, which a checkout has under the same names, and those that begin with ``_`` are none.
    """
    found = {}
    for kind in KINDS:
        for path in sorted((Path(folder) / kind).glob("*.py")):
            real = path.resolve()
            if not path.name.startswith("_") and _PACKAGE not in real.parents:
                found[f"{kind}/{path.name}"] = real
    return found


def load_plugins(folder: str | Path = ".") -> Loaded:
    """Run ``FOLDER/blocks/*.py`` and ``FOLDER/tasks/*.py``, each of which registers at least one block or task.

    A file that fails registers nothing, is logged as a warning with its line and cause, and the others go on. A file
    that was loaded before is not run again. Raises ConfigError for a folder that does not exist, and for a file that
    has changed since it was loaded: start Python anew.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"plugins: there is no folder {folder}", field="plugins", got=str(folder))
    plugins, failed = [], {}
    for name, path in plugin_files(folder).items():
        try:
            plugins.append(_load(name, path))
        except _PluginError as error:
            failed[name] = str(error)
            _FAILED.add(path)
            _log.warning("%s", error)
    return Loaded(plugins=tuple(plugins), failed=failed)


def load_files(files: Iterable[Mapping[str, str]]) -> None:
    """Load the plugins of a study: ``name``, ``path`` and ``sha256`` of each, as :func:`stored` gives them.

    Raises StudyError for a file that is missing, has changed, or fails.
    """
    for file in files:
        name, digest = file["name"], file["sha256"]
        if any(plugin.name == name and plugin.sha256 == digest for plugin in _LOADED.values()):
            continue
        here = [path for path in (Path(file["path"]), Path(name).absolute()) if path.is_file()]
        same = [path for path in here if _digest(path) == digest]
        if not same:
            why = "has changed since" if here else "is missing"
            raise StudyError(
                f"plugin {name} of the study {why} ({here[0] if here else file['path']}); bring back the file with "
                f"SHA-256 {digest[:12]}..., or choose study=NEWNAME",
                field="plugins",
                got=_digest(here[0]) if here else None,
                allowed=digest,
            )
        try:
            _load(name, same[0].resolve())
        except _PluginError as error:
            raise StudyError(str(error), field="plugins", got=name) from None


def used_by(space: Any, data: Any) -> dict[str, str]:
    """Return name -> SHA-256 of the loaded plugins whose letters a space's patterns have, or whose task the data is."""
    patterns = _strings({key: value for key, value in dict(space).items() if key != "description"})
    words = set(_strings(data))
    found = {}
    for plugin in _LOADED.values():
        for kind, key in plugin.registers:
            is_letter = re.compile(f"{re.escape(key)}(?![a-z])")
            if key in words if kind == KINDS["tasks"] else any(map(is_letter.search, patterns)):
                found[plugin.name] = plugin.sha256
    return dict(sorted(found.items()))


def stored(names: Iterable[str]) -> list[dict[str, str]]:
    """Return name, path and SHA-256 of loaded plugins, for :func:`load_files` in another process."""
    wanted = set(names)
    return [
        {"name": plugin.name, "path": str(plugin.path), "sha256": plugin.sha256}
        for plugin in _LOADED.values()
        if plugin.name in wanted
    ]


def all_loaded() -> list[dict[str, str]]:
    """Return :func:`stored` of every plugin that this process has loaded."""
    return stored(plugin.name for plugin in _LOADED.values())


def require(identity: Mapping[str, Any]) -> None:
    """Raise StudyError unless this process has loaded the plugins that a study was made with, unchanged."""
    loaded = {plugin.name: plugin.sha256 for plugin in _LOADED.values()}
    for name, digest in (identity.get("plugins") or {}).items():
        if loaded.get(name) == digest:
            continue
        words = "is loaded in another version than" if name in loaded else "is not loaded, and it is part of"
        raise StudyError(
            f"plugin {name} {words} the study; give plugins=true in the folder that has the file with SHA-256 "
            f"{digest[:12]}..., or call hybridnas.load_plugins(FOLDER) first",
            field="plugins",
            got=loaded.get(name),
            allowed=digest,
        )


def of_module(module: str) -> Plugin | None:
    """Return the plugin whose module has this name, None for anything else."""
    if not module.startswith(f"{PLUGINS}."):
        return None
    return next((plugin for plugin in _LOADED.values() if _module_name(plugin.name) == module), None)


def hint(folder: str | Path = ".") -> str:
    """Return what to add to an error where plugins lie in a folder and are not loaded; empty where there are none."""
    files = plugin_files(folder)
    failed = [name for name, path in files.items() if path in _FAILED]
    if failed:
        return f" ({', '.join(failed[:3])} could not be loaded, see above)"
    waiting = [name for name, path in files.items() if path not in _LOADED]
    if not waiting:
        return ""
    return f" ({', '.join(waiting[:3])} {'is' if len(waiting) == 1 else 'are'} not loaded: plugins=true does that)"


class _PluginError(Exception):
    """Why a file was left out, as one sentence."""


def _load(name: str, path: Path) -> Plugin:
    digest = _digest(path)
    before = _LOADED.get(path)
    if before is not None:
        if before.sha256 != digest:
            raise ConfigError(
                f"plugin {name} has changed since it was loaded; start Python anew",
                field="plugins",
                got=digest,
                allowed=before.sha256,
            )
        return before
    other = next((plugin for plugin in _LOADED.values() if plugin.name == name), None)
    if other is not None:
        raise _PluginError(f"plugin {path} is left out: {other.path} is loaded under the name {name} already")
    module_name = _module_name(name)
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    with recording() as added:
        try:
            spec.loader.exec_module(module)
            if not _own(added, module_name):
                kind = "a block" if name.startswith("blocks/") else "a task"
                raise ConfigError(f"it registers nothing; decorate {kind} with hybridnas.register_{kind[2:]}(...)")
        except Exception as error:  # code of somebody else: anything may be raised
            for registry, key in _own(added, module_name):
                registry.remove(key)
            del sys.modules[module_name]
            raise _PluginError(_sentence(name, path, error)) from error
    registers = tuple((registry.kind, key) for registry, key in _own(added, module_name))
    plugin = Plugin(name=name, path=path, sha256=digest, registers=registers)
    _LOADED[path] = plugin
    return plugin


def _own(added: Iterable[tuple[Registry[Any], str, str]], module: str) -> list[tuple[Registry[Any], str]]:
    """Return what a plugin registered itself: importing it may have filled registries with other packages' entries."""
    return [(registry, key) for registry, key, origin in added if origin == module]


def _module_name(name: str) -> str:
    return f"{PLUGINS}.{name.removesuffix('.py').replace('/', '.')}"


def _sentence(name: str, path: Path, error: BaseException) -> str:
    """Return file, line and cause of a failure as one sentence."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(path)), None)
    said = error.msg if isinstance(error, SyntaxError) else (str(error).strip().splitlines() or [""])[0]
    cause = said if isinstance(error, HybridNASError) else f"{type(error).__name__}: {said}".removesuffix(": ")
    place = f"{name}, line {line}," if line else name
    return f"plugin {place} is left out: {cause}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _strings(value: Any) -> list[str]:
    """Return every text inside plain values, keys included."""
    if isinstance(value, Mapping):
        return [text for key, item in value.items() for text in (str(key), *_strings(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []
