"""The command line: ``python -m hybridnas.NAME`` and ``hybridnas NAME`` are the same thing.

A command is ``conf/NAME.yaml`` (its settings and their defaults) and ``cli/NAME.py`` (``HELP`` and ``run(config)``).
A user's mistake ends in one sentence on stderr and exit code 2; Ctrl-C in 130.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

COMMANDS: dict[str, str] = {
    "search": "search a space of architectures at matched active parameters: train, compare, report, export the best",
    "train": "train one architecture (preset= or pattern=), resumable",
    "describe": "tables of presets, layers, parameters, FLOPs and state; out=graph.svg draws the architecture",
    "compare": "put runs and studies from MLflow side by side: table, curves, steps to reach a loss",
    "export": "write a trial's model as a folder that hybridnas.load reads",
    "generate": "stream text from an exported model",
    "evaluate": "measure a model's loss, its accuracy by length, or architectures on a suite of tasks",
    "replay": "run a trial of a study again: same seed, same data, same numbers on CPU",
    "bench": "measure kernels, training and decoding side by side with the peers that are installed",
}


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of the console script: ``hybridnas COMMAND [key=value ...]``."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        sys.exit(0)
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"hybridnas {version('hybridnas')}")
        sys.exit(0)
    if args[0] not in COMMANDS:
        from hybridnas.errors import suggest

        print(f"hybridnas: unknown command {args[0]!r}{suggest(args[0], COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    door(args[0], args[1:])


def door(command: str, argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; this is all that a ``python -m hybridnas.NAME`` door does."""
    sys.exit(_guarded(command, sys.argv[1:] if argv is None else argv))


def _guarded(command: str, argv: list[str]) -> int:
    # A thread that waits for its partner spins, by default for milliseconds: on a machine that does anything else
    # beside us, small models trained 25 times slower. A short spin costs nothing on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from hybridnas.cli.compose import compose, help_text
    from hybridnas.errors import HybridNASError

    try:
        if any(arg in ("-h", "--help") for arg in argv):
            print(help_text(command, COMMANDS[command]))
            return 0
        config = compose(command, argv)
        run = importlib.import_module(f"hybridnas.cli.{command}").run
        return int(run(config))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: be quiet at exit, too
        return 0
    except HybridNASError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # the machine's refusal, no mistake of ours: a full disk, a folder without permission
        where = f"{error.filename}: " if error.filename else ""
        print(f"{type(error).__name__}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        return 130


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
            "hybridnas COMMAND --help lists a command's settings.",
        ]
    )
