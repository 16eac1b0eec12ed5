"""Presets: published architectures as functions of a few sizes, with published counts, losses and training settings.

One file here is one family and is found by itself. It registers a table of released models with one function of their
sizes (:func:`register_family`), or functions of their own (:func:`register_preset`). A preset's keyword arguments are
its sizes; what is not given is derived by the family's rules (``hybridnas.arch.scaling``), so that every preset scales.
``n_blocks`` counts layers as the source does: a mixer and its feed-forward where the source calls both one layer, one
sub-layer in Nemotron-H. What the printed counts of MoE-Mamba do not pin down (LayerNorm, no final norm, untied head,
relu, biases) comes from the authors' code and is the default of the blocks.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hybridnas.config import FrozenConfig, option, plain
from hybridnas.errors import ConfigError, suggest
from hybridnas.registry import Registry

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch

GPT2_VOCAB = 50257
# Fields that most released models have in common.
RMSNORM: Mapping[str, Any] = {"norm": "rmsnorm", "final_norm": True}
SWIGLU: Mapping[str, Any] = {"activation": "silu", "gated": True, "bias": False}
# Experts that drop no token, initialized as if alone.
DROPLESS: Mapping[str, Any] = {"capacity_factor": None, "init_over_experts": False}
# The router of DeepSeek-V3: sigmoid scores, renormalized, balanced by a bias and next to nothing else.
SIGMOID: Mapping[str, Any] = {
    "router": "top_k",
    "scores": "sigmoid",
    "correction_bias": True,
    "renormalize": True,
    "load_balance_weight": 1e-4,
}
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


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released model: its sizes and what is published of it. The table of a family adds the sizes it has alone."""

    name: str  # of the preset
    title: str  # what its makers call it
    source: str  # where its sizes are from
    total: int  # weights of all layers, embedding and head (a tied pair once); no buffers, no extra heads [count]
    counted: str  # how ``total`` was got
    params: str = ""  # the makers' own figure
    active_params: str = ""  # the makers' own figure, where it differs
    lacks: str = ""  # what the preset has not, so that it has fewer weights than ``total``
    d_model: int
    n_blocks: int
    vocab_size: int
    n_experts: int = 0


R = TypeVar("R", bound=Release)


@dataclass(frozen=True)
class Preset:
    """A registered preset: the function, its family, and what is published: a release, or rows of a paper's tables."""

    name: str
    build: Callable[..., Arch]
    paper: tuple[PaperModel, ...] = ()
    release: Release | None = None
    family: str = ""  # file that registers it

    @property
    def summary(self) -> str:
        """The release's title and the first line of the function's docstring, for lists."""
        build = self.build.func if isinstance(self.build, functools.partial) else self.build
        line = (inspect.getdoc(build) or self.name).splitlines()[0]
        return line if self.release is None else f"{self.release.title}: {line}"

    @property
    def about(self) -> str:
        """What the file of its family says of it."""
        build = self.build.func if isinstance(self.build, functools.partial) else self.build
        return inspect.getdoc(inspect.getmodule(build)) or self.summary


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
        family = build.__module__.rpartition(".")[2]
        PRESETS.add(build.__name__, Preset(build.__name__, build, paper, family=family), build.__module__)
        return build

    return decorate


def register_family(*releases: R) -> Callable[[Callable[..., Arch]], Callable[..., Arch]]:
    """Decorator: make every release a preset of its name, built by one function of a release and keyword sizes.

    The function's keyword arguments are sizes of :class:`Release` (``d_model``, ``n_blocks``, ``vocab_size``,
    ``n_experts``), the release's own unless given. A release of 0 experts has no argument ``n_experts``.
    """

    def decorate(build: Callable[..., Arch]) -> Callable[..., Arch]:
        for release in releases:
            open_sizes = [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]
            sizes = {name: getattr(release, name) for name in open_sizes}
            made = functools.partial(build, release, **sizes)
            family = build.__module__.rpartition(".")[2]
            PRESETS.add(release.name, Preset(release.name, made, (), release, family), build.__module__)
        return build

    return decorate


def repeated(motif: str, repeats: int, **fields: Any) -> Arch:
    """Return the architecture ``(motif)xN`` with the fields of :meth:`Arch.from_pattern`; torch is loaded only now."""
    from hybridnas.arch.arch import Arch

    return Arch.from_pattern(f"({motif})x{repeats}", **fields)


def layered(layers: Iterable[str], **fields: Any) -> Arch:
    """Return the architecture of these layers, pieces of a pattern, with the fields of :meth:`Arch.from_pattern`.

    Fields of a letter that no layer has, as a shallow model may lack one, are left out.
    """
    from hybridnas.arch.arch import Arch

    pattern = "".join(layers)
    return Arch.from_pattern(pattern, **{key: value for key, value in fields.items() if len(key) > 1 or key in pattern})


def list_presets() -> list[str]:
    """Return the names of all presets; imports no torch."""
    return list(PRESETS)


def families() -> dict[str, list[str]]:
    """Return family (the file that registers it) -> names of its presets, smaller releases first; imports no torch."""
    found: dict[str, list[str]] = {}
    entries = (PRESETS.get(name) for name in PRESETS)
    for entry in sorted(entries, key=lambda x: (x.family, x.release.total if x.release else 0, x.name)):
        found.setdefault(entry.family, []).append(entry.name)
    return found


def preset(name: str, **overrides: Any) -> Arch:
    """Return a preset as an architecture. ``overrides``: the preset's own sizes (None: as they are), from which the
    rest is derived, then any field of :meth:`Arch.replace` (``final_norm=True``, ``E={"top_k": 2}``).

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
    sizes = {key: plain(value) for key, value in overrides.items() if key in own and value is not None}
    arch = entry.build(**sizes)
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
    entry = PRESETS.get(name)
    parameters = inspect.signature(entry.build).parameters.values()
    dense = entry.release is not None and not entry.release.n_experts
    return {
        parameter.name: parameter.default for parameter in parameters if not (dense and parameter.name == "n_experts")
    }


def recipe(name: str, version: int | None = None) -> Recipe:
    """Return how the paper trained the preset; ``version`` chooses between the paper's two where it has both."""
    rows = PRESETS.get(name).paper
    for row in rows:
        if version in (None, row.version):
            return row.recipe
    known = ", ".join(str(row.version) for row in rows) or "none"
    wanted = "" if version is None else f" of version {version} of the paper"
    raise ConfigError(f"preset {name!r} has no recipe{wanted}; it has: {known}")


def _fields_of(arch: Arch) -> set[str]:
    from hybridnas.arch.arch import ModelConfig
    from hybridnas.registry import BLOCKS

    letters = {slot.letter for slot in arch.pattern.slots}
    configs = [BLOCKS.get(letter).Config for letter in letters]
    blocks = {field for config in configs for field in (*config.field_names(), *config.renamed)}
    return {"pattern", *letters, *ModelConfig.field_names(), *blocks}
