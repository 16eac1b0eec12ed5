"""The command line: ``python -m hybridnas.NAME`` and ``hybridnas NAME`` are the same thing.

A command is ``cli/NAME.py``: the dataclass ``Settings`` (every setting with type, default and meaning) and
``run(settings) -> Done``. A user's mistake ends in one sentence on standard error and exit code 2; Ctrl-C in 130.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hybridnas.cli.bars import data_bars

COMMANDS: dict[str, str] = {
    "search": "search a space of architectures at matched active parameters: train, compare, report, export the best",
    "train": "train one architecture (preset= or pattern=), resumable",
    "graft": "change layers of a trained model: replace, insert, delete, reorder, widen; the others keep their weights",
    "describe": "tables of presets, layers, parameters, FLOPs and state; out=graph.svg draws the architecture",
    "data": "say what data holds before anybody trains on it: documents, scripts, copies, samples",
    "compare": "put runs and studies side by side: table, curves, tokens to reach a loss",
    "export": "write a trial's model as a folder that hybridnas.load reads",
    "import": "read a pretrained model of transformers' classes, and write it as a folder that hybridnas.load reads",
    "generate": "stream text from an exported model",
    "evaluate": "measure a model's loss, its accuracy by length, or architectures on a suite of tasks",
    "replay": "run a trial of a study again: same seed, same data, same numbers on CPU",
    "ladder": "train architectures at growing size, fit scaling laws, and say whether their order holds",
    "new": "write a block, a task or a space of your own from a template, with its test",
    "bench": "measure kernels, training and decoding beside other packages that are installed",
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run :func:`run` on the process's arguments and exit with its code: the entry point of scripts and modules."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows '?' and the command goes on
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run ``[COMMAND, "key=value", ...]`` and return the exit code: 0, 2 for a mistake, 130 for Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"hybridnas {version('hybridnas')}")
        return 0
    command, overrides = argv[0], list(argv[1:])
    if command not in COMMANDS:
        from hybridnas.errors import suggest

        print(f"hybridnas: unknown command {command!r}{suggest(command, COMMANDS)}", file=sys.stderr)
        return 2
    if not _wants(overrides, "json"):
        return _guarded(command, overrides)[0]
    with contextlib.redirect_stdout(sys.stderr):
        code, found = _guarded(command, overrides)
    print(json.dumps(found, allow_nan=False), flush=True)
    return code


def _guarded(command: str, overrides: list[str]) -> tuple[int, dict[str, Any]]:
    """Run one command and return its exit code and what it found; errors are printed, in JSON they are ``error``."""
    from hybridnas.errors import HybridNASError

    try:
        loaded = _wants(overrides, "plugins")
        if loaded:
            _load_plugins()
        if any(item in ("-h", "--help") for item in overrides):
            from hybridnas.cli.help import help_text

            print(help_text(command, COMMANDS[command], [item for item in overrides if not item.startswith("-")]))
            return 0, {}
        from hybridnas.cli.compose import read_settings

        settings = read_settings(command, overrides)
        if settings.plugins != loaded:
            raise _not_in_a_file(command)
        with data_bars():
            done = importlib.import_module(f"hybridnas.cli.{command}").run(settings)
        return done.code, _json_ready(done.found)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: be quiet at exit, too
        return 0, {}
    except HybridNASError as error:
        facts = {"field": error.field, "got": error.got, "allowed": error.allowed}
        return 2, _failed(type(error).__name__, f"{error}{_plugin_hint(error)}", facts)
    except OSError as error:  # the machine's refusal: a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        return 2, _failed(type(error).__name__, f"{where}{error.strerror or error}", {})
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        return 130, {"error": {"type": "KeyboardInterrupt", "message": "stopped by Ctrl-C"}}


def _failed(kind: str, message: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    print(f"{kind}: {message}", file=sys.stderr)
    return {"error": {"type": kind, "message": message, **_json_ready(facts)}}


def _wants(overrides: list[str], name: str) -> bool:
    """Whether the last ``NAME=`` says yes; a value that is neither is refused with the other settings."""
    given = [item.partition("=")[2].lower() for item in overrides if item.lstrip("+").startswith(f"{name}=")]
    return bool(given) and given[-1] in ("true", "yes", "on")


def _load_plugins() -> None:
    """Load the working folder's plugins before settings are read, and say in one line what was loaded."""
    from hybridnas.plugins import load_plugins

    print(load_plugins().words, flush=True)  # those that fail are logged


def _not_in_a_file(command: str) -> Exception:
    from hybridnas.errors import ConfigError

    return ConfigError(
        f"{command} plugins=true runs code, so it is given on the command line, not in an experiment's file",
        field="plugins",
        got=True,
        allowed="the command line",
    )


def _plugin_hint(error: Exception) -> str:
    """Return what to add to an error over an unknown letter, task or space: plugins that wait in this folder."""
    from hybridnas.errors import PatternError

    about = ("data", "kind", "block letter", "blocks", "plugins", "arch")
    if not isinstance(error, PatternError) and str(getattr(error, "field", "")).rpartition(".")[2] not in about:
        return ""
    from hybridnas.plugins import hint

    return hint()


def _json_ready(value: Any) -> Any:
    """Return the value as JSON has it: numbers that are not finite become null, other types their text."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "hybridnas: architecture search for hybrid sequence models",
            "",
            "usage: hybridnas COMMAND [key=value ...]     (or python -m hybridnas.COMMAND)",
            "",
            *lines,
            "",
            "hybridnas COMMAND --help lists a command's settings; with json=true the last line of its output is JSON.",
        ]
    )
