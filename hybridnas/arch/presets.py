"""The paper's models as data: MoE-Mamba (arXiv 2401.04081), its baselines, and how each was trained.

A preset is a function from a few sizes to an :class:`~hybridnas.arch.arch.Arch`; what is not given is derived by the
paper's rules, so that every preset scales. What the printed counts do not pin down (LayerNorm, no final norm, untied
head, relu, biases) comes from the authors' code and is the default of the blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError, suggest
from hybridnas.registry import Registry

if TYPE_CHECKING:  # names of presets are listed without torch
    from hybridnas.arch.arch import Arch

GPT2_VOCAB = 50257


@dataclass(frozen=True, kw_only=True)
class Recipe(FrozenConfig):
    """How the paper trained a model: one run, in the units of the paper."""

    source: str = option(doc="where the figures stand")
    steps: int = option(doc="optimiser steps [count]", ge=1)
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
    """A registered preset: the function, and the rows of the paper that it stands for, its own first."""

    name: str
    build: Callable[..., Arch]
    paper: tuple[PaperModel, ...]

    @property
    def summary(self) -> str:
        """First line of the function's docstring, for lists."""
        return (inspect.getdoc(self.build) or self.name).splitlines()[0]


PRESETS: Registry[Preset] = Registry("preset")


def register_preset(*paper: PaperModel) -> Callable[[Callable[..., Arch]], Callable[..., Arch]]:
    """Decorator: make a function of keyword sizes with defaults a preset of its name, with its rows of the paper."""

    def decorate(build: Callable[..., Arch]) -> Callable[..., Arch]:
        PRESETS.add(build.__name__, Preset(build.__name__, build, paper))
        return build

    return decorate


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
        if key in own and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"preset {name!r} {key}={value!r} must be a whole number of at least 1")
    arch = entry.build(**{key: value for key, value in overrides.items() if key in own})
    rest = {key: value for key, value in overrides.items() if key not in own}
    if not rest:
        return arch
    allowed = _fields_of(arch)
    for key in rest:
        if key not in allowed:
            hint = suggest(key, [*own, *allowed]).partition("; allowed")[0]
            raise ConfigError(
                f"preset {name!r} has no argument {key!r}{hint}; allowed: {', '.join(own)}, "
                f"and fields of its architecture: {', '.join(sorted(allowed - set(own)))}"
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
    blocks = {field for letter in letters for field in BLOCKS.get(letter).Config.field_names()}
    return {"pattern", *letters, *ModelConfig.field_names(), *blocks}


def _arch(motif: str, repeats: int, **fields: Any) -> Arch:
    from hybridnas.arch.arch import Arch

    return Arch.from_pattern(f"({motif})x{repeats}", **fields)


def _heads(n_heads: int | None) -> dict[str, int]:
    """The paper's heads are 64 channels wide, which is the attention block's own default."""
    return {} if n_heads is None else {"n_heads": n_heads}


# Version 1, Table 3. It gives no schedule, weight decay or optimiser: those are version 2's.
_V1 = Recipe(source="v1, Table 3", steps=100_000, batch_size=256, seq_len=256, lr=1e-3)
_V2 = Recipe(source="v2, Table 5", steps=150_000, batch_size=64, seq_len=1024, lr=5e-4)
_V2_MAMBA = _V2.replace(lr=1e-3)
_V2_100M = Recipe(source="v2, Table 6", steps=30_000, batch_size=1024, seq_len=1024, lr=5e-4)


@register_preset(
    PaperModel(version=1, params="25M", active_params="25M", loss=3.66, recipe=_V1),
    PaperModel(version=2, params="25M", active_params="25M", loss=3.43, recipe=_V2),
)
def transformer(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    d_ff: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and dense feed-forward in turn: Transformer-25M."""
    return _arch("AF", n_blocks, d_model=d_model, vocab_size=vocab_size, A=_heads(n_heads), d_ff=d_ff or 4 * d_model)


@register_preset(
    PaperModel(version=1, params="545M", active_params="25M", loss=3.54, recipe=_V1),
    PaperModel(version=2, params="545M", active_params="25M", loss=3.23, recipe=_V2),
)
def transformer_moe(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 32,
    d_expert: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and Switch experts in turn: Transformer-MoE-25M."""
    experts = {"n_experts": n_experts, "d_expert": d_expert or 4 * d_model}
    return _arch("AE", n_blocks, d_model=d_model, vocab_size=vocab_size, A=_heads(n_heads), E=experts)


@register_preset(
    PaperModel(version=1, params="27M", active_params="27M", loss=3.51, recipe=_V1),
    PaperModel(version=2, params="27M", active_params="27M", loss=3.34, recipe=_V2_MAMBA),
)
def mamba(*, d_model: int = 512, n_blocks: int = 16, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba alone: Mamba-25M."""
    return _arch("M", n_blocks, d_model=d_model, vocab_size=vocab_size)


@register_preset(PaperModel(version=1, params="26M", active_params="26M", loss=3.56, recipe=_V1))
def mamba_mlp(*, d_model: int = 512, n_blocks: int = 8, d_ff: int | None = None, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba and dense feed-forward in turn: Mamba-MLP."""
    return _arch("MF", n_blocks, d_model=d_model, vocab_size=vocab_size, d_ff=d_ff or 3 * d_model)


@register_preset(PaperModel(version=1, params="416M", active_params="26M", loss=3.41, recipe=_V1))
def moe_mamba(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 32,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba of the paper's first version."""
    experts = {"n_experts": n_experts, "d_expert": d_expert or 3 * d_model}
    return _arch("ME", n_blocks, d_model=d_model, vocab_size=vocab_size, E=experts)


@register_preset(PaperModel(version=2, params="542M", active_params="26M", loss=3.19, recipe=_V2))
def moe_mamba_42e(
    *,
    d_model: int = 512,
    n_blocks: int = 8,
    n_experts: int = 42,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba-25M of the paper's second version."""
    return moe_mamba(d_model=d_model, n_blocks=n_blocks, n_experts=n_experts, d_expert=d_expert, vocab_size=vocab_size)


@register_preset(
    PaperModel(version=2, params="121M", active_params="121M", loss=2.99, recipe=_V2_100M.replace(lr=1e-3))
)
def mamba_100m(*, d_model: int = 768, n_blocks: int = 32, vocab_size: int = GPT2_VOCAB) -> Arch:
    """Mamba alone: Mamba-100M."""
    return mamba(d_model=d_model, n_blocks=n_blocks, vocab_size=vocab_size)


@register_preset(
    PaperModel(version=2, params="2454M", active_params="114M", loss=2.88, recipe=_V2_100M.replace(lr=2.5e-4))
)
def transformer_moe_100m(
    *,
    d_model: int = 768,
    n_blocks: int = 16,
    n_experts: int = 32,
    d_expert: int | None = None,
    n_heads: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Attention and Switch experts in turn: Transformer-MoE-100M."""
    return transformer_moe(
        d_model=d_model,
        n_blocks=n_blocks,
        n_experts=n_experts,
        d_expert=d_expert,
        n_heads=n_heads,
        vocab_size=vocab_size,
    )


# The paper prints 117M active; its own configuration counts 117,522,432, the one cell that does not round to print.
@register_preset(PaperModel(version=2, params="2439M", active_params="117M", loss=2.81, recipe=_V2_100M))
def moe_mamba_100m(
    *,
    d_model: int = 768,
    n_blocks: int = 16,
    n_experts: int = 42,
    d_expert: int | None = None,
    vocab_size: int = GPT2_VOCAB,
) -> Arch:
    """Mamba and Switch experts in turn: MoE-Mamba-100M."""
    return moe_mamba(d_model=d_model, n_blocks=n_blocks, n_experts=n_experts, d_expert=d_expert, vocab_size=vocab_size)
