"""How a model is trained: every figure in tokens, so that runs of different batch shapes can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from hybridnas.arch.presets import Recipe
from hybridnas.config import MAX_SEED, FrozenConfig, option
from hybridnas.errors import ConfigError

EVALUATIONS = 6  # how often a run is measured when eval_at names no points
# Part of the peak rate at which an annealed model (schedule wsd) ends, in searches, ladders and the truth set: a decay
# to zero gives the lowest loss at many tokens per parameter (2502.15938). A training by itself has final_lr_fraction.
ANNEALED_LR_FRACTION = 0.0
NOT_IDENTITY = ("checkpoint_seconds",)  # fields that may change when a run goes on: they touch no number
# Fields that older runs do not know, and the value they stand for, as ``to_dict`` has it.
ADDED = {
    "devices": 1,
    "allow_noncausal": False,
    "decay_fraction": 0.15,
    "anneal_at": [],
    "rate_scaling": "none",
    "base_width": 48,
    "optimizer": "adamw",
    "embedding_lr": 1.0,
    "z_loss": 0.0,
    "short_first": [],
    "short_tokens": None,
}


class Decay(NamedTuple):
    """A stretch of schedule ``wsd`` over which the rate falls, in optimizer steps [count]."""

    start: int  # the last step at the full rate
    end: int  # the step after which the model is finished and scored


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FrozenConfig):
    """One training run. The defaults suit models of 0.1 to 5 million active parameters on a few cores."""

    prefix: ClassVar[str] = "train"

    tokens: int = option(1_000_000, "training tokens in all; the step that reaches them is the last [tokens]", ge=1)
    batch_size: int = option(16, "sequences in one forward pass [count]", ge=1)
    seq_len: int = option(256, "context length [tokens]", ge=1)
    short_first: tuple[int, ...] = option(
        (),
        "shorter contexts to begin with, rising, each a divisor of seq_len; a step has as many tokens, in more "
        "sequences [tokens]",
        ge=1,
    )
    short_tokens: int | None = option(None, "of short_first: tokens trained at each of its contexts [tokens]", ge=1)
    accumulate: int = option(1, "forward passes whose gradients are summed into one step [count]", ge=1)
    lr: float = option(6e-3, "highest learning rate", gt=0)
    warmup_fraction: float = option(0.01, "linear warm-up, as a part of all tokens [1]", ge=0, le=1)
    schedule: str = option(
        "cosine",
        "how the learning rate goes on after warm-up; wsd: constant, then a linear decay",
        choices=("cosine", "constant", "wsd"),
    )
    final_lr_fraction: float = option(
        0.1, "last learning rate of cosine and wsd, as a part of the highest [1]", ge=0, le=1
    )
    decay_fraction: float = option(
        0.15, "of wsd: the part of the tokens up to a finished model over which its rate falls [1]", gt=0, le=0.9
    )
    anneal_at: tuple[int, ...] = option(
        (),
        "of wsd: training-token counts at which a finished model is scored on a branch with a decay of its own; "
        "training goes on from before that decay; the end is always one [tokens]",
    )
    rate_scaling: str = option(
        "none",
        "mup: learning rates and initial weights by width and kind of weight, so that the best lr at base_width is "
        "that of every width (hybridnas.train.scaling); none: one rate for all weights",
        choices=("none", "mup"),
    )
    base_width: int = option(48, "d_model at which lr was found, for rate_scaling=mup [channels]", ge=1)
    embedding_lr: float = option(1.0, "learning rate of the embedding, in units of lr [1]", gt=0)
    optimizer: str = option(
        "adamw",
        "muon: Muon for the matrices inside the blocks, AdamW for all other weights, at the same lr",
        choices=("adamw", "muon"),
    )
    z_loss: float = option(
        0.0, "weight of the squared logarithm of the logits' normalizer, added to the training loss [1]", ge=0
    )
    weight_decay: float = option(0.1, "AdamW weight decay", ge=0)
    decay_all: bool = option(False, "decay biases, norms, embeddings and SSM parameters too, as the paper did [yes/no]")
    beta1: float = option(0.9, "AdamW decay of the gradient's mean", ge=0, le=1)
    beta2: float = option(0.999, "AdamW decay of the gradient's variance", ge=0, le=1)
    grad_clip: float = option(0.5, "largest norm of all gradients together; 0: no clipping", ge=0)
    precision: str = option(
        "auto",
        "of matrix products; auto: bfloat16 on a CUDA device that has it, else float32 (weights are always float32)",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = option(False, "compile the training step with torch.compile [yes/no]")
    allow_noncausal: bool = option(
        False,
        "train a model whose layers see later tokens (expert_choice): its loss is no language model's [yes/no]",
    )
    devices: int = option(1, "processes, each with a device, that share every batch [count]", ge=1)
    seed: int = option(0, "seed of weights and dropout", ge=0, le=MAX_SEED)
    data_seed: int | None = option(None, "seed of the data's order; none: as seed", ge=0, le=MAX_SEED)
    eval_at: tuple[int, ...] = option(
        (), f"training-token counts at which to measure; the end is always one; none: {EVALUATIONS} even points"
    )
    valid_tokens: int = option(131_072, "validation tokens of one measurement, the same ones each time [tokens]", ge=1)
    checkpoint_seconds: float = option(30.0, "longest training that a crash can cost [s]", ge=0)
    divergence_factor: float | None = option(
        1.5,
        "give up when the loss stays above this many times ln(vocabulary), that of a blind guess; none: never",
        gt=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < self.step_tokens:
            raise ConfigError(
                f"{self.label()} tokens={self.tokens} is less than one step of {self.step_tokens} tokens (batch_size="
                f"{self.batch_size} * seq_len={self.seq_len} * accumulate={self.accumulate}); "
                f"raise tokens or lower these",
                field="train.tokens",
                got=self.tokens,
                allowed=f">= {self.step_tokens}",
            )
        self._check_short_first()
        for name in ("eval_at", "anneal_at"):
            points = getattr(self, name)
            for point in points:
                if not 0 < point <= self.tokens:
                    raise ConfigError(
                        f"{self.label()} {name} has {point!r}, it must hold whole numbers from 1 to "
                        f"tokens={self.tokens}",
                        field=f"train.{name}",
                        got=point,
                        allowed=f"1 to {self.tokens}",
                    )
            if list(points) != sorted(set(points)):
                raise ConfigError(
                    f"{self.label()} {name}={list(points)} must rise from point to point",
                    field=f"train.{name}",
                    got=list(points),
                    allowed="rising counts",
                )
        if self.anneal_at and self.schedule != "wsd":
            raise ConfigError(
                f"{self.label()} anneal_at={list(self.anneal_at)} needs schedule=wsd, got schedule={self.schedule}: "
                f"only wsd has a constant rate to go on from",
                field="train.anneal_at",
                got=self.schedule,
                allowed="wsd",
            )
        if self.anneal_at and self.anneal_at[0] <= self.warmup_tokens:
            raise ConfigError(
                f"{self.label()} anneal_at has {self.anneal_at[0]}, which lies within the warm-up of "
                f"{self.warmup_tokens:,.0f} tokens; take later points or a smaller warmup_fraction",
                field="train.anneal_at",
                got=self.anneal_at[0],
                allowed=f"above {self.warmup_tokens:,.0f}",
            )

    def _check_short_first(self) -> None:
        """Raise ConfigError for shorter contexts that do not rise, do not divide ``seq_len``, or have no tokens."""
        lengths, label = list(self.short_first), self.label()
        if lengths != sorted({*lengths}) or any(self.seq_len % length or length == self.seq_len for length in lengths):
            raise ConfigError(
                f"{label} short_first={lengths} must rise and hold divisors of seq_len={self.seq_len} below it",
                field="train.short_first",
                got=lengths,
                allowed=f"divisors of {self.seq_len}",
            )
        if (self.short_tokens is None) == bool(lengths):
            raise ConfigError(
                f"{label} short_first={lengths} and short_tokens={self.short_tokens} belong together: which contexts, "
                f"and how many tokens at each",
                field="train.short_tokens",
                got=self.short_tokens,
                allowed=">= 1" if lengths else None,
            )
        if lengths and len(lengths) * (self.short_tokens or 0) > self.tokens:
            raise ConfigError(
                f"{label} short_tokens={self.short_tokens} at {len(lengths)} contexts pass tokens={self.tokens}",
                field="train.short_tokens",
                got=self.short_tokens,
                allowed=f"<= {self.tokens // len(lengths)}",
            )

    def context_at(self, step: int) -> int:
        """Return the context that step ``step`` (from 0) is trained at [tokens]."""
        if self.short_tokens is None:
            return self.seq_len
        stage = step * self.step_tokens // self.short_tokens
        return self.short_first[stage] if stage < len(self.short_first) else self.seq_len

    @classmethod
    def label(cls) -> str:
        return "train"

    @classmethod
    def from_recipe(cls, recipe: Recipe, **changes: Any) -> TrainConfig:
        """Return the paper's settings of a preset (``presets.recipe(name)``), with some fields changed."""
        shared = {n: getattr(recipe, n) for n in recipe.field_names() if n in cls.field_names()}
        return cls.from_dict({**shared, "tokens": recipe.tokens, **changes})

    @property
    def step_tokens(self) -> int:
        """Training tokens of one optimizer step [tokens]."""
        return self.batch_size * self.seq_len * self.accumulate

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run; the last one may pass ``tokens`` by less than a step [count]."""
        return -(-self.tokens // self.step_tokens)

    @property
    def warmup_tokens(self) -> float:
        """Tokens over which the learning rate rises."""
        return self.warmup_fraction * self.tokens

    def eval_steps(self) -> tuple[int, ...]:
        """Return the steps after which the model is measured: those that reach ``eval_at``, and the last.

        With ``wsd`` also the ends of all decays, and nothing within a decay: there the model is neither at the full
        rate nor finished.
        """
        points = self.eval_at or tuple(self.tokens * i // EVALUATIONS for i in range(1, EVALUATIONS))
        steps = {-(-max(1, point) // self.step_tokens) for point in (*points, self.tokens)}
        decays = self.decays()
        steps = {step for step in steps if not any(decay.start < step < decay.end for decay in decays)}
        return tuple(sorted(steps | {decay.end for decay in decays}))

    def decays(self) -> tuple[Decay, ...]:
        """Return the decays of schedule ``wsd`` in order, the last one that of the end; none for other schedules."""
        if self.schedule != "wsd":
            return ()
        ends = sorted({-(-point // self.step_tokens) for point in (*self.anneal_at, self.tokens)})
        return tuple(Decay(end - max(1, round(self.decay_fraction * end)), end) for end in ends)

    def trained_steps(self, step: int | None = None) -> int:
        """Return the steps trained up to the measurement at ``step``, branches included; None: at the end [count]."""
        upto = self.steps if step is None else step
        return upto + sum(decay.end - decay.start for decay in self.decays() if decay.end < upto)

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers of a run: what a checkpoint must agree with."""
        kept = {name: value for name, value in self.to_dict().items() if name not in NOT_IDENTITY}
        return {name: value for name, value in kept.items() if name not in ADDED or value != ADDED[name]}
