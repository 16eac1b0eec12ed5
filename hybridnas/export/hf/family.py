"""What a family of transformers classes registers: how its config and its tensors are ours, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import SWIGLU
from hybridnas.export.hf.settings import Settings
from hybridnas.export.hf.weights import Hub, Piece
from hybridnas.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Family:
    """One ``model_type`` of transformers."""

    model_types: tuple[
        str, ...
    ]  # the class's own, which is also the name of the format, and those of which it is a part
    class_name: str  # transformers' class of language models
    defaults: Mapping[str, Any]  # what the class reads of its config, with the class's defaults
    arch: Callable[[Settings], Arch]
    pieces: Callable[[Settings, Arch], Iterable[Piece]]
    config: Callable[[Arch], dict[str, Any]]  # the config nearest to an architecture; ConfigError where there is none
    aliases: Mapping[str, str] = field(default_factory=dict)  # another name of a setting -> its name in ``defaults``
    renames: Sequence[tuple[str, str]] = ()  # regular expression of a stored name -> what the class calls it
    unused: Sequence[str] = ()  # regular expressions of tensors that have no part in the function
    style: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: dict.fromkeys("FE", SWIGLU)
    )  # of the releases
    needs_attention: bool = False  # whether the class cannot decode without, since its cache counts tokens there
    hub: Hub = Hub()  # names of released checkpoints
    written: bool = True  # whether it is a format of exports; else ``config`` raises ConfigError that says why not

    def settings(self, config: Mapping[str, Any]) -> Settings:
        """Return the values of a config of this family."""
        return Settings(config, self.defaults, self.aliases, str(config.get("model_type", self.model_types[0])))


FAMILIES: Registry[Family] = Registry("model_type", "hybridnas.export.hf")


def register(family: Family) -> None:
    """Make a family known by its model types."""
    for name in family.model_types:
        FAMILIES.add(name, family)
