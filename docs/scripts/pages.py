"""Reference pages written from the code: commands, settings, blocks, presets, spaces, tasks, errors."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Iterable
from pathlib import Path

from hybridnas.config import FrozenConfig, allowed_text

ROOT = Path(__file__).resolve().parents[2]


def all_pages() -> dict[str, str]:
    """Return path -> Markdown of every generated page."""
    return {
        "reference/commands.md": commands(),
        "reference/settings.md": settings(),
        "reference/blocks.md": blocks(),
        "reference/presets.md": presets(),
        "reference/spaces.md": spaces(),
        "reference/tasks.md": tasks(),
        "reference/errors.md": errors(),
        "reference/environment.md": environment(),
    }


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def code(value: object) -> str:
    """Return a value in code style, nothing for nothing."""
    text = str(value)
    return f"`{text}`" if text else ""


def type_name(hint: object) -> str:
    """Return a type as a reader of a table writes it."""
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is None and isinstance(hint, type):
        words = {"str": "text", "int": "integer", "float": "number", "bool": "yes/no", "Path": "path"}
        return words.get(hint.__name__, hint.__name__)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
    if typing.get_origin(hint) in (tuple, list):
        return "list of " + " or ".join(type_name(argument) for argument in arguments)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    return "mapping" if "Mapping" in str(hint) or "dict" in str(hint) else "any"


def default_of(field: dataclasses.Field[object]) -> str:
    """Return a field's default as it is typed on a command line; ``required`` where there is none."""
    if "group" in field.metadata:  # a choice by name, such as space=mamba_moe
        return code(field.metadata["group"] or "null")
    if field.default is not dataclasses.MISSING:
        value: object = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, (tuple, list)):
        return code("[" + ",".join(map(str, value)) + "]")
    if isinstance(value, FrozenConfig):
        return "its defaults"
    return code(getattr(value, "value", value)) if value != "" else '`""`'


def fields_table(config: type[FrozenConfig], prefix: str = "", skip: Iterable[str] = ()) -> str:
    """Return the settings of a config: name, meaning, default, allowed values and type."""
    rows = []
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        rows.append(
            (
                code(f"{prefix}{field.name}"),
                field.metadata.get("doc", ""),
                default_of(field),
                code(allowed_text(field).replace(" | ", ", ").replace("9.22337e+18", "2^63 - 1")),
                "choice" if "group" in field.metadata else type_name(config.type_of(field.name)),
            )
        )
    return table(("setting", "meaning", "default", "allowed", "type"), rows)


def docstring(thing: object) -> str:
    """Return the docstring's first paragraph on one line."""
    return " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())


def commands() -> str:
    """Return the page of commands: what each does and its own settings."""
    from hybridnas.cli import COMMANDS
    from hybridnas.cli.command import settings_class

    parts = [
        "# Commands\n",
        "`python -m hybridnas.NAME` and `hybridnas NAME` are the same. Settings are written `key=value`; "
        "`--help` prints them; `json=true` makes the last line of output one JSON object. Groups of settings "
        "(`budget.*`, `data.*`, `train.*`, ...) are on [the settings page](settings.md).\n",
        table(("command", "what it does"), [(f"[`{name}`](#{name})", text) for name, text in COMMANDS.items()]),
    ]
    for name, text in COMMANDS.items():
        parts.append(f"## {name}\n\n{text[:1].upper()}{text[1:]}.\n")
        parts.append(fields_table(settings_class(name)))
    return "\n".join(parts)


def settings() -> str:
    """Return the page of all groups of settings, written from the dataclass fields."""
    from hybridnas.data.config import DataConfig
    from hybridnas.data.source import SOURCES
    from hybridnas.search.config import Budget, SearchConfig
    from hybridnas.suites.suite import SuiteConfig
    from hybridnas.train.config import TrainConfig

    parts = [
        "# Settings\n",
        "Written from the code at build time. A field's type, default and allowed values have one source, its "
        "dataclass field. Numbers may be typed `1e6`, `500k`, `1M`; lists `[a,b]`; `null` is none.\n",
        "## budget\n\n" + docstring(Budget) + "\n\n" + fields_table(Budget, "budget."),
        "## search\n\n"
        + docstring(SearchConfig)
        + "\n\n"
        + fields_table(SearchConfig, "", ("space", "data", "budget")),
        "## train\n\n" + docstring(TrainConfig) + "\n\n" + fields_table(TrainConfig, "train."),
        "## data\n\n"
        + docstring(DataConfig)
        + " Tasks have settings of their own, below.\n\n"
        + fields_table(DataConfig, "data.", ("kind",)),
        "## data: tasks and mixtures\n",
    ]
    for name in SOURCES:
        config = SOURCES.get(name).config
        if config is not DataConfig:
            parts.append(f"### data={name}\n\n{docstring(config)}\n\n" + fields_table(config, "data.", ("kind",)))
    parts.append("## space\n\nKeys of a space's YAML: see [adding a space](../guides/adding-a-space.md).\n")
    parts.append("## suite\n\n" + docstring(SuiteConfig) + "\n\n" + fields_table(SuiteConfig, "suite."))
    return "\n".join(parts)


def blocks() -> str:
    """Return the page of blocks: letters, options, parameter counts at one width."""
    from hybridnas.arch.arch import ModelConfig
    from hybridnas.layers.block import BlockConfig
    from hybridnas.registry import BLOCKS

    parts = [
        "# Blocks\n",
        "One letter of a pattern is one residual sub-layer. The cost is that of the defaults at `d_model=512` and a "
        "context of 1,024.\n",
    ]
    rows = []
    for letter in BLOCKS:
        block = BLOCKS.get(letter)
        cost = block.Config(d_model=512).cost(1024)
        rows.append(
            (
                f"[`{letter}`](#{letter.lower()}-{block.name.replace(' ', '-')})",
                block.name,
                f"{cost.params:,}",
                f"{cost.active_params:,}",
                f"{cost.flops_per_token:,.0f}",
                f"{cost.state_bytes:,}",
            )
        )
    parts.append(table(("letter", "block", "parameters", "active", "FLOP per token", "state [bytes]"), rows))
    for letter in BLOCKS:
        block = BLOCKS.get(letter)
        parts.append(
            f"## {letter} {block.name}\n\n{docstring(block)}\n\n"
            + fields_table(block.Config, "", BlockConfig.field_names())
        )
    parts.append(
        "## Around every block\n\nEvery letter has these too; [Around the blocks](../concepts/around.md) has the "
        "formulas.\n\n" + fields_table(BlockConfig, "", ("d_model",))
    )
    parts.append("## The model\n\n" + docstring(ModelConfig) + "\n\n" + fields_table(ModelConfig))
    return "\n".join(parts)


def presets() -> str:
    """Return the page of presets with exact counts, one section for each family, its recipe drawn at a small depth."""
    from hybridnas.arch.presets import PRESETS, families, preset, preset_arguments
    from hybridnas.cli.describe import active_counts, letters_of, stated
    from hybridnas.draw.strips import strips_text
    from hybridnas.draw.svg import svg_text

    named = [(name, preset(name)) for names in families().values() for name in names]
    parts = [
        "# Presets\n",
        "Published architectures, exact to the integer; parameters without embedding and head, "
        "FLOPs and state at a context of 1,024. Each scales by its family's rules: "
        "`preset=qwen3_next preset.d_model=64 preset.n_blocks=8`. Widths, heads and states follow `d_model`, attention "
        "keeps its share of the layers; `n_blocks` counts layers as the source does. "
        "`python -m hybridnas.describe` prints them side by side, `out=presets.svg` draws them.\n",
        f'<div class="diagram drawing" markdown="0">{strips_text(named)}</div>\n',
    ]
    rows = []
    for name, arch in named:
        cost = arch.cost(seq_len=1024)
        rows.append(
            (
                f"[`{name}`](#{name})",
                code(letters_of(arch)),
                f"{cost.params:,}",
                f"{cost.active_params:,}",
                f"{cost.embedding_params:,}",
                f"{cost.flops_per_token:,.0f}",
                f"{cost.state_bytes:,}",
            )
        )
    head = (
        "preset",
        "pattern",
        "parameters",
        "active",
        "embedding and head",
        "FLOP per token",
        "state at 1,024 [bytes]",
    )
    parts.append(table(head, rows))
    for family, names in families().items():
        parts.append(f"## Family {family}\n\n{PRESETS.get(names[0]).about}\n")
        depth = preset_arguments(names[0]).get("n_blocks") or 8
        drawn = svg_text(preset(names[0], n_blocks=min(8, depth)))
        parts.append(
            f'`{names[0]}` at `n_blocks={min(8, depth)}`:\n\n<div class="diagram drawing" markdown="0">{drawn}</div>\n'
        )
        for name in names:
            entry = PRESETS.get(name)
            sizes = ", ".join(
                f"`{key}={'null' if value is None else value}`" for key, value in preset_arguments(name).items()
            )
            parts.append(f"### {name}\n\n{entry.summary}\n\nSizes: {sizes}.\n")
            if (release := entry.release) is not None:
                parts.append(
                    f"- {release.total:,} parameters with embedding and head, counted by {release.counted}. Its makers "
                    f"state {stated(release, active_counts(preset(name)))}. Source: {release.source}."
                    + f" The preset lacks {release.lacks}." * bool(release.lacks)
                    + "\n"
                )
            for row in entry.paper:
                parts.append(
                    f"- Printed (version {row.version} of the paper): {row.params} parameters, {row.active_params} "
                    f"active, loss {row.loss}; recipe: {row.recipe.source}, {row.recipe.steps:,} steps of "
                    f"{row.recipe.batch_size} x {row.recipe.seq_len} tokens, learning rate {row.recipe.lr:g}.\n"
                )
    return "\n".join(parts)


def spaces() -> str:
    """Return the page of the spaces and budgets that ship with the package, as their files say."""
    import yaml

    parts = ["# Spaces and budgets\n", "`space=NAME` and `budget=NAME` take these; your own YAML comes first.\n"]
    for kind, folder in (("space", ROOT / "hybridnas/search_spaces"), ("budget", ROOT / "hybridnas/conf/budget")):
        for path in sorted(folder.glob("*.yaml")):
            text = path.read_text(encoding="utf-8")
            described = yaml.safe_load(text).get("description", "")
            parts.append(f"## {kind}={path.stem}\n\n{described}\n\n```yaml\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def tasks() -> str:
    """Return the page of data kinds, with the text that ``describe`` prints of each task."""
    from hybridnas.data.config import DataConfig
    from hybridnas.data.source import SOURCES

    rows = []
    for name in SOURCES:
        kind = SOURCES.get(name)
        module = importlib.import_module(kind.open.__module__)
        about = " ".join((module.__doc__ or "").strip().split("\n\n")[0].split())
        about = about.split(": ", 1)[-1] if about.startswith("``data=") else about
        settings_link = "#data" if kind.config is DataConfig else f"#data{name}"
        rows.append((f"[`data={name}`](settings.md{settings_link})", about.replace("``", "`")))
    return (
        "# Data and tasks\n\nKinds of data that `data=` takes. Synthetic tasks are made on the fly; an example belongs "
        "to the test set if its inputs hash into one sixteenth of all hashes, so no example is ever on both sides.\n\n"
        + table(("data", "what it is"), rows)
    )


def environment() -> str:
    """Return the page of environment variables."""
    from hybridnas.cli.help import ENVIRONMENT

    rows = [(code(name), text) for name, text in ENVIRONMENT.items()]
    return "# Environment variables\n\nEvery variable that the package reads.\n\n" + table(("variable", "effect"), rows)


def errors() -> str:
    """Return the page of errors, with real messages of a few mistakes."""
    import hybridnas
    from hybridnas import errors as module
    from hybridnas.errors import HybridNASError

    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, HybridNASError)]
    parts = [
        "# Errors\n",
        "Every error that a user's mistake or a machine's refusal can cause is a `HybridNASError`. A command prints "
        "one sentence and exits with code 2; from Python, the exception carries `field`, `got` and `allowed`.\n",
        table(("error", "when"), [(code(error.__name__), docstring(error)) for error in found]),
        "## Examples\n",
    ]
    mistakes = {
        "a letter that no block has": lambda: hybridnas.Arch.from_pattern("(MMQA)x6", d_model=64, vocab_size=256),
        "a misspelled option": lambda: hybridnas.Arch.from_pattern("M{d_stat=8}", d_model=64, vocab_size=256),
        "heads that do not divide the width": lambda: hybridnas.Arch.from_pattern(
            "A{n_heads=5}", d_model=64, vocab_size=256
        ),
        "a preset that does not exist": lambda: hybridnas.preset("moe_mamab"),
    }
    for what, mistake in mistakes.items():
        try:
            mistake()
        except HybridNASError as error:
            parts.append(f"**{what[:1].upper()}{what[1:]}**\n\n```text\n{type(error).__name__}: {error}\n```\n")
            parts.append(
                table(("field", "got", "allowed"), [(code(error.field), code(error.got), code(error.allowed))])
            )
        else:
            raise AssertionError(f"{what} raised nothing")
    return "\n".join(parts)
