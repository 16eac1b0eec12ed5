"""Settings of a ladder: which architectures, how large, how long, by which laws, and what is fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hybridnas.config import MAX_SEED, FrozenConfig, option
from hybridnas.errors import ConfigError

# What does not decide the numbers of a run, so that a ladder can go on, and grow, with other values.
FREE = (
    *("top", "patterns", "presets", "sizes", "seeds", "hold_out", "resamples"),
    *("name", "runs", "device", "workers", "storage", "heartbeat", "minutes"),
)


@dataclass(frozen=True, kw_only=True)
class LadderConfig(FrozenConfig):
    """One ladder. Architectures come from a study (its best and its baselines), or are named."""

    prefix: ClassVar[str] = "ladder"

    study: str | None = option(None, "study whose best and baselines are trained: its name or folder")
    top: int = option(4, "how many of the study's best, baselines besides [count]", ge=1)
    patterns: tuple[str, ...] = option((), "architectures as patterns; with a study: beside its own [patterns]")
    presets: tuple[str, ...] = option((), "presets; with a study: beside its own [names]")
    sizes: tuple[float, ...] = option((1.0, 2.0, 4.0, 8.0), "active parameters, as multiples of size 1 [factors]", gt=0)
    active_params: int | None = option(
        None, "active parameters of size 1; none: the study's, or those of the first architecture [count]", ge=1
    )
    depth_power: float = option(
        0.0, "depth grows as size to this power, width takes the rest; 0: width alone, 1: depth alone [1]", ge=0, le=1
    )
    seeds: int = option(2, "trainings of every architecture at every size [count]", ge=1)
    seed: int = option(0, "the first of the seeds [integer]", ge=0, le=MAX_SEED)
    tokens: tuple[float, ...] = option(
        (10.0, 20.0, 40.0, 80.0), "where a run is annealed and measured [training tokens per active parameter]", gt=0
    )
    decay_fraction: float = option(0.15, "part of an annealed run's tokens over which its rate falls [1]", gt=0, le=0.9)
    warmup: float = option(1.0, "linear warm-up of the rate [training tokens per active parameter]", ge=0)
    lr: float | None = option(
        None, "learning rate at size 1; none: the best that the study found for each, else the budget's [1]", gt=0
    )
    lr_power: float = option(-1 / 3, "the rate grows as size to this power, by OLMo's ladder [1]")
    rates: tuple[float, ...] = option(
        (1.0,),
        "multiples of its rate that each architecture tries at the smallest size, to keep the best; while that is an "
        "end of them, up to two more beyond it are tried",
        gt=0,
    )
    batch_size: int | None = option(
        None, "sequences per step at size 1; none: the study's or the budget's [count]", ge=1
    )
    batch_power: float = option(2 / 3, "the batch grows as size to this power, by OLMo's ladder [1]", ge=0)
    hold_out: int = option(1, "largest sizes that a first fit does not see, to test it on them [count]", ge=0)
    resamples: int = option(200, "bootstrap resamples behind an interval [count]", ge=20)
    budget: Mapping[str, Any] | None = option(None, "sizes and batch shape of size 1; none: the study's, or laptop")
    data: Mapping[str, Any] | None = option(None, "what is trained on; none: the study's data, or stdlib")
    name: str | None = option(None, "name of the ladder and its folder; none: ladder-STUDY, or ladder [text]")
    runs: Path = option(Path("runs"), "folder in which studies and ladders lie")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    workers: int = option(1, "processes on this host that train runs side by side [count]", ge=1)
    storage: str | None = option(
        None,
        "PostgreSQL URL, or env: from HYBRIDNAS_STORAGE; hosts with the same command train together; none: the folder "
        "alone [URL]",
        repr=False,
    )
    heartbeat: int = option(
        20, "in a database, time between heartbeats of a process; after three its run is free [s]", ge=1
    )
    minutes: float | None = option(None, "stop after this long; the same command goes on; none: no limit [min]", gt=0)

    @classmethod
    def label(cls) -> str:
        return "ladder"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("sizes", "tokens", "rates"):  # 1 and 1.0 are written alike
            object.__setattr__(self, field, tuple(map(float, getattr(self, field))))
        for field in ("sizes", "tokens"):
            values = getattr(self, field)
            if not values or list(values) != sorted(set(values)):
                raise ConfigError(
                    f"ladder {field}={list(values)} must be numbers that rise, at least one",
                    field=f"ladder.{field}",
                    got=list(values),
                    allowed="rising numbers",
                )
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ConfigError(
                f"ladder rates={list(self.rates)} must be different multiples of the rate, at least one, such as 1",
                field="ladder.rates",
                got=list(self.rates),
                allowed="different numbers, one or more",
            )
        stable = (1 - self.decay_fraction) * self.tokens[0]
        if self.warmup > stable:
            raise ConfigError(
                f"ladder warmup={self.warmup:g} is longer than the stable part of the shortest annealed run, "
                f"{stable:g} tokens per active parameter (tokens={self.tokens[0]:g}, decay_fraction="
                f"{self.decay_fraction:g}); lower warmup or raise the first of tokens",
                field="ladder.warmup",
                got=self.warmup,
                allowed=f"<= {stable:g}",
            )
        if self.study and self.budget is not None:
            raise ConfigError(
                f"ladder study={self.study} brings its own budget; leave budget= out, lr= and batch_size= may differ",
                field="ladder.budget",
                got=self.budget.get("name"),
            )

    @property
    def title(self) -> str:
        """The ladder's name: the given one, else ``ladder-STUDY`` or ``ladder``."""
        if self.name:
            return self.name
        return f"ladder-{Path(self.study).name}" if self.study else "ladder"
