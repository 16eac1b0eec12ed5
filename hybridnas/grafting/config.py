"""Settings of a graft."""

from __future__ import annotations

from dataclasses import dataclass

from hybridnas.config import MAX_SEED, FrozenConfig, option
from hybridnas.errors import ConfigError

STARTS = ("copy", "qkv", "upcycle", "split", "merge", "zero", "random")  # in grafting.initial; torch is not needed here
FITTED = "+fit"
INITS = "auto, zero, random, fit, copy, qkv, upcycle, split, merge, or one of these with +fit"


@dataclass(frozen=True, kw_only=True)
class GraftConfig(FrozenConfig):
    """How new blocks start, and how the result is trained."""

    init: str = option(
        "auto",
        "start of new blocks: copy, qkv, upcycle, split, merge (by what the old block is), random, zero; with +fit "
        "fitted to the old block's outputs; fit: random+fit; auto: of those that apply, the least loss after the fit",
    )
    fit_tokens: int = option(65_536, "tokens of data that new blocks are fitted on [tokens]", ge=1)
    fit_lr: float = option(1e-2, "highest learning rate of the fit", gt=0)
    noise: float = option(0.01, "standard deviation of noise on copied experts, in units of their weights' [1]", ge=0)
    tokens: int = option(0, "tokens of the training after the graft; 0: none [tokens]", ge=0)
    distill_logits: float = option(
        0.0, "in that training: weight of KL(model before, model after) of the predictions [1]", ge=0
    )
    distill_hidden: float = option(
        0.0, "in that training: weight of the relative squared difference of the residual streams [1]", ge=0
    )
    temperature: float = option(1.0, "of the distilled predictions [1]", gt=0)
    seed: int = option(0, "seed of new weights and of the order of the fit's data", ge=0, le=MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in ("auto", "fit") and self.init.removesuffix(FITTED) not in STARTS:
            raise ConfigError(
                f"{self.label()} init={self.init!r} is no start of a new block; use {INITS}",
                field="init",
                got=self.init,
                allowed=INITS,
            )

    @classmethod
    def label(cls) -> str:
        return "graft"

    @property
    def start(self) -> str | None:
        """The start of new blocks, None where several are measured."""
        return None if self.init == "auto" else "random" if self.init == "fit" else self.init.removesuffix(FITTED)

    @property
    def fits(self) -> bool:
        """Whether new blocks are fitted to the old ones' outputs."""
        return self.init in ("auto", "fit") or self.init.endswith(FITTED)

    @property
    def needs_data(self) -> bool:
        """Whether the settings say something that cannot be done without data."""
        return bool(self.tokens) or (self.fits and self.init != "auto")
