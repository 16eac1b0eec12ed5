"""What every command has in common: its settings as one dataclass, and what it returns."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hybridnas.config import FrozenConfig, option

DEVICE = "auto, cpu, cuda or cuda:N"
TRACKING = "MLflow tracking URI; none: sqlite in the folder; shared: in the folder above; off: no MLflow [URI]"
EXPERIMENT = "experiment of MLflow that the run is recorded in [text]"
ARCH = "fields of the architecture and its blocks: arch.d_model=64 arch.n_experts=8 arch.E.d_expert=128"
PATTERN = "architecture as a pattern, e.g. '(ME)x8'; its width is arch.d_model"


@dataclass(frozen=True, kw_only=True)
class Command(FrozenConfig):
    """Settings of a command. Groups (:func:`group`) are mappings that Hydra composes from a named choice."""

    json: bool = option(
        False,
        "the last line of standard output is one JSON object with what was found, all else goes to standard error",
    )
    plugins: bool = option(False, "run ./blocks/*.py and ./tasks/*.py first, which register blocks and tasks [yes/no]")


@dataclass(frozen=True)
class Done:
    """How a command ended: what it found, ready for JSON, and the exit code."""

    found: Mapping[str, Any]
    code: int = 0


def group(choice: str | None, doc: str) -> Any:
    """Declare a group: a mapping that ``NAME=CHOICE`` fills and ``NAME.KEY=VALUE`` changes; ``choice`` is the default.

    None means that nothing is chosen unless the user does so.
    """
    metadata = {"doc": doc, "group": choice}
    if choice is None:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def shorthand(config: type[FrozenConfig], name: str) -> Any:
    """Declare a setting that stands for a field of a group, with that field's meaning and bounds; none: the group's."""
    field = config.field(name)
    metadata = {**field.metadata, "doc": f"{field.metadata['doc']}; none: the {config.prefix}'s"}
    return dataclasses.field(default=None, metadata=metadata)


def settings_class(command: str) -> type[Command]:
    """Return the dataclass of a command's settings."""
    found: type[Command] = importlib.import_module(f"hybridnas.cli.{command}").Settings
    return found


def groups_of(settings: type[FrozenConfig]) -> dict[str, str | None]:
    """Return the groups among a command's settings, each with the choice that is taken unasked."""
    return {field.name: field.metadata["group"] for field in dataclasses.fields(settings) if "group" in field.metadata}
