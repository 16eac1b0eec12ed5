"""The runs of a ladder: architecture, size, seed, rate and batch of each, by the laws of OLMo's ladder.

Rate and batch are anchored at size 1 and grow with powers of the size, -1/3 and 2/3 by default (OLMo-core's
model_ladder); an architecture whose study found a rate of its own is anchored there. A run is warmed up over as many
tokens as it has active parameters, trains at a constant rate, and is annealed to a rate of zero at several token counts
(schedule ``wsd``). All architectures of one size get the same tokens and batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hybridnas.arch.arch import Arch
from hybridnas.data.source import Source
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.entrants import Base, entrants, grown
from hybridnas.search.config import Budget
from hybridnas.train.config import ANNEALED_LR_FRACTION, TrainConfig
from hybridnas.train.loop import identity

TUNING_SEED = 1_000_000  # above the first seed: what chooses a rate is no result, and more seeds do not change it


@dataclass(frozen=True)
class LadderRun:
    """One training of a ladder."""

    entrant: str
    arch: Arch
    factor: float  # size over size 1
    rate: float  # multiple of the law's rate
    config: TrainConfig
    folder: Path
    tuning: bool = False  # it only helps to choose the rate

    @property
    def key(self) -> str:
        """The run's folder within the ladder's: no two runs share it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def lock(self) -> Path:
        """The file whose lock is held by the process of this host that trains the run."""
        return self.folder.parents[2] / ".claims" / f"{self.key.replace('/', '--')}.lock"

    @property
    def trained_tokens(self) -> int:
        """Tokens that the run trains, branches of its annealing included [count]."""
        return self.config.trained_steps() * self.config.step_tokens


@dataclass(frozen=True)
class Plan:
    """A ladder's runs; those behind a choice of rate are known once it has been made."""

    config: LadderConfig
    budget: Budget
    target: int  # active parameters of size 1
    archs: dict[str, dict[float, Arch]]  # entrant -> factor -> architecture
    anchors: dict[str, float]  # entrant -> learning rate at size 1
    source: Source
    folder: Path

    def tuning(self, name: str, rate: float) -> LadderRun:
        """Return the run that tries a multiple of an architecture's rate: at the smallest size, with its own seed."""
        return self.run(name, self.config.sizes[0], self.config.seed + TUNING_SEED, rate, tuning=True)

    def runs(self, rates: dict[str, float]) -> Iterator[LadderRun]:
        """Yield the runs whose losses are reported, small sizes first; ``rates``: each architecture's multiple."""
        for factor in self.config.sizes:
            for seed in range(self.config.seed, self.config.seed + self.config.seeds):
                for name in self.archs:
                    yield self.run(name, factor, seed, rates[name])

    def train_config(self, name: str, factor: float, seed: int, rate: float) -> TrainConfig:
        """Return how a run of an architecture and a size is trained; ``rate``: multiple of the law's rate."""
        config, budget = self.config, self.budget
        batch = max(1, round(budget.batch_size * factor**config.batch_power))
        step = batch * budget.seq_len
        size = self.target * factor
        points = sorted({step * math.ceil(size * count / step) for count in config.tokens})
        return TrainConfig(
            tokens=points[-1],
            batch_size=batch,
            lr=self.anchors[name] * factor**config.lr_power * rate,
            warmup_fraction=min(1.0, config.warmup * size / points[-1]),
            schedule="wsd",
            final_lr_fraction=ANNEALED_LR_FRACTION,
            decay_fraction=config.decay_fraction,
            anneal_at=tuple(points),
            eval_at=tuple(points),
            seed=seed,
            **budget.shared_settings(),
        )

    def run(self, name: str, factor: float, seed: int, rate: float, tuning: bool = False) -> LadderRun:
        """Return one run."""
        arch, config = self.archs[name][factor], self.train_config(name, factor, seed, rate)
        text = json.dumps(identity(arch, self.source, config), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        place = self.folder / "trainings" / _slug(name) / f"size{factor:g}-rate{rate:g}-seed{seed}-{digest}"
        return LadderRun(name, arch, factor, rate, config, place, tuning)


def make_plan(config: LadderConfig, base: Base, source: Source) -> Plan:
    """Return the ladder's runs; raises ConfigError, MatchError or StudyError for what cannot be grown or trained."""
    from hybridnas.train.objective import check_causal

    budget = base.budget.replace(seq_len=source.context(None, base.budget.seq_len))
    ones = entrants(config, base, source.vocab_size)
    target = config.active_params or ones[0].active_params
    archs = {
        one.name: {factor: grown(one, factor, config, budget, round(target * factor)) for factor in config.sizes}
        for one in ones
    }
    for sizes in archs.values():
        check_causal(sizes[config.sizes[0]], False)
    anchors = {one.name: budget.lr if one.lr is None else one.lr for one in ones}
    return Plan(config, budget, target, archs, anchors, source, Path(config.runs).expanduser() / config.title)


def _slug(text: str) -> str:
    """Return a folder name that people can read and no two texts share."""
    plain = re.sub(r"[^\w.=+-]+", "_", text).strip("_")
    return plain if plain == text else f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
