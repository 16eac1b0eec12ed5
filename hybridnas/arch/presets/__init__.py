"""Presets: published architectures as functions of a few sizes, with published counts, losses and training settings.

One file here is one family; it registers its presets with :func:`register_preset` and is found by itself. A preset's
keyword arguments are its sizes; what is not given is derived by the paper's rules, so that every preset scales. What
the printed counts of MoE-Mamba do not pin down (LayerNorm, no final norm, untied head, relu, biases) comes from the
authors' code and is the default of the blocks.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridnas.config import FrozenConfig, option, plain
from hybridnas.errors import ConfigError, suggest
from hybridnas.registry import Registry

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch

GPT2_VOCAB = 50257
DEFAULT_REFERENCE = "moe_mamba"  # the preset that a study compares with unless its space names another, or none
DEFAULT_BASELINES = (DEFAULT_REFERENCE, "mamba", "mamba_mlp", "transformer", "transformer_moe")


@dataclass(frozen=True, kw_only=True)
class Recipe(FrozenConfig):
    """How the paper trained a model: one run, in the units of the paper."""

    source: str = option(doc="table of the paper with these figures")
    steps: int = option(doc="optimizer steps [count]", ge=1)
    batch_size: int = option(doc="sequences in a batch [count]", ge=1)
    seq_len: int = option(doc="context length [tokens]", ge=1)
    lr: float = option(doc="highest learning rate", gt=0)
    warmup_fraction: float = option(0.01, "linear warm-up, as a part of all steps [1]", ge=0, le=1)
    schedule: str = option("cosine", "how the learning rate falls after warm-up", choices=("cosine",))
    final_lr_fraction: float = option(0.1, "last learning rate, as a part of the highest [1]", ge=0, le=1)
    weight_decay: float = option(0.1, "AdamW weight decay", ge=0)
    decay_all: bool = option(True, "one group: decay biases, norms and SSM parameters as well [yes/no]")
    grad_clip: float = option(0.5, "largest gradient norm", gt=0)
    beta1: float = option(0.9, "AdamW decay of the mean", ge=0, le=1)
    beta2: float = option(0.999, "AdamW decay of the variance", ge=0, le=1)

    @property
    def tokens(self) -> int:
        """Tokens read in the whole run [count]."""
        return self.steps * self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """One row of the paper's tables: figures as printed, parameters without embedding and head."""

    version: int  # of arXiv 2401.04081
    params: str
    active_params: str
    loss: float  # v1: loss after 100k steps; v2: smoothed training log-perplexity at the end [nats per token]
    recipe: Recipe


@dataclass(frozen=True)
class Preset:
    """A registered preset: the function, and the published rows of this model, its own first."""

    name: str
    build: Callable[..., Arch]
    paper: tuple[PaperModel, ...]

    @property
    def summary(self) -> str:
        """First line of the function's docstring, for lists."""
        return (inspect.getdoc(self.build) or self.name).splitlines()[0]


PRESETS: Registry[Preset] = Registry("preset", "hybridnas.arch.presets", groups=("hybridnas.presets",))


def register_preset(*paper: PaperModel) -> Callable[[Callable[..., Arch]], Callable[..., Arch]]:
    """Decorator: make a function of keyword sizes with defaults a preset of its name, with its published rows.

    The first line of its docstring is its summary in lists. Its arguments are whole numbers of at least 1, or None for
    a size that is derived from the others; ``d_model``, ``n_blocks`` (repeats of the motif) and ``vocab_size`` let a
    search scale it. Raises ConfigError for a name that is taken or is none, such as a lambda's.
    """

    def decorate(build: Callable[..., Arch]) -> Callable[..., Arch]:
        if not build.__name__.isidentifier():
            raise ConfigError(
                f"a preset is a named function, got {build.__name__!r}; define it with def",
                field="preset",
                got=build.__name__,
            )
        PRESETS.add(build.__name__, Preset(build.__name__, build, paper), build.__module__)
        return build

    return decorate


def repeated(motif: str, repeats: int, **fields: Any) -> Arch:
    """Return the architecture ``(motif)xN`` with the fields of :meth:`Arch.from_pattern`; torch is loaded only now."""
    from hybridnas.arch.arch import Arch

    return Arch.from_pattern(f"({motif})x{repeats}", **fields)


def list_presets() -> list[str]:
    """Return the names of all presets; imports no torch."""
    return list(PRESETS)


def preset(name: str, **overrides: Any) -> Arch:
    """Return a preset as an architecture. ``overrides``: the preset's own sizes, from which the rest is derived, then
    any field of :meth:`Arch.replace` (``final_norm=True``, ``E={"top_k": 2}``).

    Raises ConfigError for an unknown preset or override, naming what is allowed.
    """
    entry = PRESETS.get(name)
    own = preset_arguments(name)
    for key, value in overrides.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if key in own and value is not None and not (whole and value >= 1):
            raise ConfigError(
                f"preset {name!r} {key}={value!r} must be a whole number of at least 1",
                field=f"preset.{key}",
                got=value,
                allowed=">= 1",
            )
    arch = entry.build(**{key: plain(value) for key, value in overrides.items() if key in own})
    rest = {key: value for key, value in overrides.items() if key not in own}
    if not rest:
        return arch
    allowed = _fields_of(arch)
    for key in rest:
        if key not in allowed:
            hint = suggest(key, [*own, *allowed]).partition("; allowed")[0]
            raise ConfigError(
                f"preset {name!r} has no argument {key!r}{hint}; allowed: {', '.join(own)}, "
                f"and fields of its architecture: {', '.join(sorted(allowed - set(own)))}",
                field=f"preset.{key}",
                got=key,
                allowed=(*own, *sorted(allowed - set(own))),
            )
    return arch.replace(**rest)


def preset_arguments(name: str) -> dict[str, int | None]:
    """Return the preset's own arguments with their defaults; None is derived from the others."""
    parameters = inspect.signature(PRESETS.get(name).build).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def recipe(name: str, version: int | None = None) -> Recipe:
    """Return how the paper trained the preset; ``version`` chooses between the paper's two where it has both."""
    rows = PRESETS.get(name).paper
    for row in rows:
        if version in (None, row.version):
            return row.recipe
    known = ", ".join(str(row.version) for row in rows) or "none"
    raise ConfigError(f"preset {name!r} has no recipe of version {version} of the paper; it has: {known}")


def _fields_of(arch: Arch) -> set[str]:
    from hybridnas.arch.arch import ModelConfig
    from hybridnas.registry import BLOCKS

    letters = {slot.letter for slot in arch.pattern.slots}
    configs = [BLOCKS.get(letter).Config for letter in letters]
    blocks = {field for config in configs for field in (*config.field_names(), *config.renamed)}
    return {"pattern", *letters, *ModelConfig.field_names(), *blocks}
