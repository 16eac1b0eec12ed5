"""Settings of a search: its budget (sizes, lengths, limits), sampler, pruner, objectives, storage and workers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybridnas.config import MAX_SEED, FrozenConfig, option
from hybridnas.data.source import source_config
from hybridnas.errors import ConfigError, suggest
from hybridnas.plugins import used_by
from hybridnas.registry import only_here
from hybridnas.study.objectives import FIRST_LIMITS, LIMITS, read_objectives, wants_hardware
from hybridnas.train.config import ANNEALED_LR_FRACTION, TrainConfig

if TYPE_CHECKING:
    from hybridnas.search_spaces.space import Scale

SAMPLERS = ("tpe", "evolution", "nsga2", "gp", "random", "bruteforce")
PRUNERS = ("halving", "hyperband", "none")
USUAL_SAMPLER = "evolution"  # fewest tokens to the best 1 % of the table: python -m hybridnas.bench samplers
# Fields that older studies do not know, and the value they stand for.
ADDED = {
    "schedule": "cosine",
    "decay_fraction": 0.15,
    "rate": "shared",
    "base_width": TrainConfig().base_width,
    "embedding_lr": TrainConfig().embedding_lr,
    "optimizer": TrainConfig().optimizer,
    "z_loss": TrainConfig().z_loss,
    "confirm_rates": "own",
    "confirm_screen": None,
    "train_baselines": "within",
    "verdict_seeds": 4,
    "alpha": 0.05,
}
LEAST_MINUTES = 2.0  # of a search that starts processes by itself: each takes seconds to start
MOST_PROCESSES = 16  # processes, of about 400 MB each, where nothing else is asked for
# Of a budget, what may change when a study goes on.
LIMITS_OF_A_CALL = (
    *("n_trials", "minutes", "max_tokens", "name", "train_baselines"),
    *("confirm", "confirm_top", "confirm_screen", "confirm_rates", "confirm_seeds", "verdict_seeds", "alpha"),
)


def check_sampler(name: str, objectives: Sequence[str]) -> None:
    """Raise ConfigError for an unknown sampler, and for evolution with several objectives."""
    if name not in SAMPLERS:
        raise ConfigError(
            f"search sampler={name!r} is unknown{suggest(name, SAMPLERS)}", field="sampler", got=name, allowed=SAMPLERS
        )
    if name == "evolution" and len(objectives) > 1:
        raise ConfigError(
            "search sampler=evolution looks for one objective; with several take nsga2 or tpe",
            field="sampler",
            got=name,
            allowed=("nsga2", "tpe"),
        )


@dataclass(frozen=True, kw_only=True)
class Budget(FrozenConfig):
    """How large the models are, how long each is trained, and when the search ends."""

    prefix: ClassVar[str] = "budget"

    name: str = option("custom", "name of the budget [text]")
    d_model: int = option(doc="width of the residual stream [channels]", ge=8)
    depth: int = option(doc="residual sub-layers [count]", ge=1)
    n_experts: int = option(8, "experts of the presets that have some [count]", ge=1)
    active_params: int | None = option(
        None, "target; none: those of the space's reference at this size [count per token]", ge=1
    )
    multiple: int = option(8, "sizes are multiples of this [channels]", ge=1)
    seq_len: int = option(256, "context [tokens]", ge=1)
    batch_size: int = option(16, "sequences per step [count]", ge=1)
    tokens_per_active_param: float = option(20.0, "training tokens of an unpruned trial [per active parameter]", gt=0)
    lr: float = option(TrainConfig().lr, "peak learning rate [1]", gt=0)
    rate: str = option(
        "shared",
        "shared: every trial trains at lr; tuned: each races rates around it to the first rung, and the best goes on; "
        "scaled: lr is that of base_width, and each weight has the rate that its width needs (train.rate_scaling=mup)",
        choices=("shared", "tuned", "scaled"),
    )
    base_width: int = option(
        TrainConfig().base_width, "d_model at which lr was found, for rate=scaled [channels]", ge=1
    )
    embedding_lr: float = option(1.0, "learning rate of the embedding, in units of lr [1]", gt=0)
    optimizer: str = option("adamw", "as train.optimizer", choices=("adamw", "muon"))
    z_loss: float = option(0.0, "as train.z_loss [1]", ge=0)
    weight_decay: float = option(0.1, "decoupled weight decay [1]", ge=0)
    schedule: str = option(
        "cosine",
        "learning rate after warm-up; cosine: rungs compare unfinished models; wsd: at every rung a branch with its "
        "own decay is scored, and what is promoted goes on from before it",
        choices=("cosine", "wsd"),
    )
    decay_fraction: float = option(
        0.15, "of wsd: the part of a rung's tokens over which the rate falls [1]", gt=0, le=0.9
    )
    rungs: int = option(3, "rungs of the pruner, the last one the full run [count]", ge=1)
    reduction: int = option(3, "one in so many goes on from a rung to the next [count]", ge=2)
    growth: int | None = option(
        None, "a rung trains this many times longer than the one before; none: as reduction [factor]", ge=2
    )
    evals: int = option(9, "points of the loss curve, at least; every rung is one [count]", ge=1)
    valid_tokens: int = option(65536, "validation tokens per evaluation, the same for all trials [tokens]", ge=1)
    n_trials: int = option(30, "the search ends with this many finished trials, presets included [count]", ge=1)
    train_baselines: str = option(
        "within",
        "which of the space's baselines are trained; within: those that keep the limits, the others are shown from "
        "their costs; all; none",
        choices=("within", "all", "none"),
    )
    minutes: float | None = option(
        None, "no trial starts that would end later than this [minutes]; none: no limit", gt=0
    )
    confirm: str = option(
        "off", "train the best ones and the best baselines again with fresh seeds", choices=("off", "on")
    )
    confirm_top: int = option(
        3, "how many of the best drawn are confirmed, and of the baselines beside the reference [count]", ge=1
    )
    confirm_screen: int | None = option(
        None,
        "so many of the best drawn get one more seed, by which and the search's own confirm_top of them are confirmed "
        "[count]; none, or not above confirm_top: no such stage",
        ge=1,
    )
    confirm_rates: str = option(
        "own",
        "own: what is confirmed races rates at full length first, and is judged at its best; shared: at its trial's",
        choices=("own", "shared"),
    )
    confirm_seeds: int = option(3, "fresh seeds of each confirmed architecture, which choose the winner [count]", ge=2)
    verdict_seeds: int = option(
        4, "further seeds of the winner and what it is compared with, which state the differences [count]", ge=4
    )
    alpha: float = option(0.05, "significance level of claimed differences; intervals have 1 - alpha [1]", gt=0, le=0.5)
    max_tokens: int | None = option(
        None, "no new candidate once so many tokens were trained in all [tokens]; none: no limit", ge=1
    )
    precision: str = option(
        "auto", "auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bfloat16")
    )
    compile: bool = option(False, "torch.compile each model [yes/no]")
    devices: int = option(1, "processes, each with a device, that train a trial together [count]", ge=1)

    @classmethod
    def label(cls) -> str:
        return "budget"

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimiser step reads."""
        return self.batch_size * self.seq_len

    @property
    def screened(self) -> int:
        """Return how many of the best drawn get one more seed before some of them are confirmed; 0: no such stage."""
        asked = self.confirm_screen or 0
        return asked if asked > self.confirm_top else 0

    def rung_tokens(self, active_params: int) -> tuple[int, ...]:
        """Return the token counts of the rungs: whole steps, each ``growth`` times the one before."""
        growth = self.growth or self.reduction
        top = growth ** (self.rungs - 1)
        first = max(1, math.ceil(active_params * self.tokens_per_active_param / (self.step_tokens * top)))
        return tuple(first * self.step_tokens * growth**rung for rung in range(self.rungs))

    def eval_tokens(self, active_params: int) -> tuple[int, ...]:
        """Return where a trial is evaluated: the rungs, and points between them for the curve."""
        rungs = self.rung_tokens(active_params)
        steps = rungs[-1] // self.step_tokens
        evenly = {max(1, steps * point // self.evals) * self.step_tokens for point in range(1, self.evals + 1)}
        return tuple(sorted(evenly | set(rungs)))

    def train_config(self, active_params: int, seed: int) -> TrainConfig:
        """Return how every trial of the study is trained."""
        rungs = self.rung_tokens(active_params)
        annealed = self.schedule == "wsd"
        return TrainConfig(
            tokens=rungs[-1],
            schedule=self.schedule,
            decay_fraction=self.decay_fraction,
            final_lr_fraction=ANNEALED_LR_FRACTION if annealed else TrainConfig().final_lr_fraction,
            anneal_at=rungs[:-1] if annealed else (),
            batch_size=self.batch_size,
            lr=self.lr,
            eval_at=self.eval_tokens(active_params),
            devices=self.devices,
            seed=seed,
            **self.shared_settings(),
        )

    def shared_settings(self) -> dict[str, Any]:
        """Return the settings of a training that depend on neither its size nor its length: also those of a ladder."""
        return {
            "seq_len": self.seq_len,
            "rate_scaling": "mup" if self.rate == "scaled" else "none",
            **{
                name: getattr(self, name)
                for name in (
                    *("base_width", "embedding_lr", "optimizer", "z_loss", "weight_decay"),
                    *("valid_tokens", "precision", "compile"),
                )
            },
        }

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide a study's numbers, in the form that older studies have."""
        kept = {name: value for name, value in self.to_dict().items() if name not in LIMITS_OF_A_CALL}
        return {name: value for name, value in kept.items() if name not in ADDED or value != ADDED[name]}

    def scale(self, vocab_size: int) -> Scale:
        """Return the size at which the space is searched."""
        from hybridnas.search_spaces.space import Scale  # which loads torch, and help texts need this module

        return Scale(
            d_model=self.d_model,
            depth=self.depth,
            vocab_size=vocab_size,
            n_experts=self.n_experts,
            active_params=self.active_params,
            multiple=self.multiple,
            seq_len=self.seq_len,
        )


@dataclass(frozen=True, kw_only=True)
class SearchConfig(FrozenConfig):
    """One search, as the command line or a script describes it."""

    space: Mapping[str, Any] = option(doc="the space's YAML as a mapping")
    data: Mapping[str, Any] = option(doc="the data's settings as a mapping")
    budget: Budget = option(doc="sizes, lengths and limits")
    study: str | None = option(None, "name of the study and its folder; none: SPACE-BUDGET-HASH of its settings [text]")
    runs: Path = option(Path("runs"), "folder in which studies lie")
    seed: int = option(0, "everything random derives from it [integer]", ge=0, le=MAX_SEED)
    sampler: str = option(
        "auto",
        "what draws the next candidate; auto: evolution, with several objectives tpe",
        choices=("auto", *SAMPLERS),
    )
    pruner: str = option("halving", "what stops or pauses a trial early", choices=PRUNERS)
    objectives: tuple[str, ...] = option(("val_loss",), "what is looked for; the first decides the order [names]")
    against: str | None = option(
        None, "a study to be better than; random: a random search of equal cost is run; none: the presets alone"
    )
    state_length: int | None = option(
        None, "context at which state_bytes counts as objective or limit [tokens]; none: the budget's seq_len", ge=1
    )
    max_params: float | None = option(None, "most parameters of a candidate [count]; none: no limit", gt=0)
    max_active_params: float | None = option(None, "most active parameters of a candidate [count]; none: any", gt=0)
    max_state_bytes: float | None = option(None, "most state of one sequence [bytes]; none: no limit", gt=0)
    max_flops: float | None = option(
        None, "most FLOPs of a forward pass per token, at the budget's seq_len [FLOP]; none: no limit", gt=0
    )
    max_latency_ms: float | None = option(
        None, "longest time here to generate a token of one sequence after state_length tokens [ms]; none: any", gt=0
    )
    min_train_tokens_per_second: float | None = option(
        None, "least speed of training here, in steps of the budget's batch [tokens/s]; none: any", gt=0
    )
    min_prefill_tokens_per_second: float | None = option(
        None, "least speed here of reading prompts of state_length tokens, speed_batch at once [tokens/s]", gt=0
    )
    min_decode_tokens_per_second: float | None = option(
        None, "least speed here of generating after state_length tokens, all of speed_batch together [tokens/s]", gt=0
    )
    speed_batch: int | None = option(
        None,
        "sequences of prefill and decode when measured [count]; none: the budget's batch_size, and 1",
        ge=1,
    )
    tracking: str | None = option(
        None,
        "MLflow tracking URI; none: sqlite in the study folder; shared: one for all studies, RUNS/mlflow.db; off: no "
        "MLflow [URI]",
        aliases={"false": "off"},
    )
    tracking_experiment: str = option("hybridnas", "experiment of MLflow that the study is recorded in [text]")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    workers: int | None = option(
        None,
        "processes on this host that train trials side by side [count]; none: one for each core of a CPU where the "
        "budget has two minutes or more, whose course depends on the machine's speed anyway, else one",
        ge=1,
    )
    confirm_workers: int | None = option(
        None, "processes that train confirmations side by side; none: one for each core or GPU [count]", ge=1
    )
    worker: str = option(
        "off",
        "join: take part in a study that others began; create: begin it if need be",
        choices=("off", "join", "create"),
        aliases={"true": "join"},
    )
    heartbeat: int = option(
        20, "in a database, time between heartbeats of a worker; after three its trial is free [s]", ge=1
    )
    storage: str | None = option(
        None, "PostgreSQL URL, or env: from HYBRIDNAS_STORAGE; none: the study's folder [URL]", repr=False
    )

    @classmethod
    def label(cls) -> str:
        return "search"

    def __post_init__(self) -> None:
        super().__post_init__()
        read_objectives(self.objectives)
        if self.sampler == "auto":
            object.__setattr__(self, "sampler", USUAL_SAMPLER if len(self.objectives) == 1 else "tpe")
        check_sampler(self.sampler, self.objectives)
        if len(self.objectives) > 1 and self.pruner == "hyperband":
            raise ConfigError(
                "search pruner=hyperband cannot prune by several objectives, Optuna takes no reports of them; "
                "choose pruner=halving, or none",
                field="pruner",
                got=self.pruner,
                allowed=("halving", "none"),
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits of a candidate that were set, by name."""
        return {name: value for name in LIMITS if (value := getattr(self, name)) is not None}

    @property
    def hardware(self) -> bool:
        """Whether candidates are measured on this machine."""
        return wants_hardware(self.objectives, self.limits)

    @property
    def trainers(self) -> int:
        """Processes that train trials: as asked for, else one for each core of a CPU where the budget has its minutes.

        A model of these sizes gains nothing from a second thread. Without minutes the course of a search follows from
        its seed alone, which takes one process.
        """
        if self.workers is not None:
            return self.workers
        from hybridnas.hardware import pick_device

        timed = (self.budget.minutes or 0.0) >= LEAST_MINUTES and pick_device(self.device).type == "cpu"
        return self._beside_each_other() if timed else 1

    @property
    def confirmers(self) -> int:
        """Processes that train confirmations: as asked for, else as many as there are cores or GPUs."""
        return self._beside_each_other() if self.confirm_workers is None else self.confirm_workers

    def _beside_each_other(self) -> int:
        """Return how many trainings this host bears; 1 where each has processes already, or a new one would fail."""
        if self.budget.devices > 1 or self.worker != "off" or only_here():
            return 1
        from hybridnas.hardware import pick_device, usable_cores

        device = pick_device(self.device)
        if device.type == "cpu":
            return min(usable_cores(), MOST_PROCESSES)
        import torch

        return torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1

    @property
    def name(self) -> str:
        """The study's name: the given one, or SPACE-BUDGET-HASH of all that makes the study.

        A study of the same settings that an earlier version called SPACE-BUDGET is gone on with. Where two studies
        share the four digits of the hash, the later one has eight.
        """
        if self.study is not None:
            return self.study
        identity = json.loads(json.dumps(self.identity(), sort_keys=True))
        digits = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        plain = f"{self.space.get('name', 'space')}-{self.budget.name}"
        runs = Path(self.runs).expanduser()
        for name in (plain, f"{plain}-{digits[:4]}"):
            stored = _stored_identity(runs / name)
            if stored == identity or (stored is None and name != plain):
                return name
        return f"{plain}-{digits[:8]}"

    def identity(self) -> dict[str, Any]:
        """Return what makes two calls the same study; limits such as n_trials and minutes may change in between."""
        kept = ("seed", "sampler", "pruner", "objectives", "state_length", *FIRST_LIMITS)
        later = ("speed_batch", *(name for name in LIMITS if name not in FIRST_LIMITS))  # older studies lack them
        data = source_config(self.data)
        budget = self.budget.replace(
            seq_len=data.own_seq_len or self.budget.seq_len
        )  # a task's examples have their own
        plugins = used_by(self.space, self.data)
        return {
            "space": {k: v for k, v in self.space.items() if k != "description" and v not in (None, [], ())},
            "data": {k: v for k, v in data.to_dict().items() if k != "cache_dir" and v is not None},
            "budget": budget.identity(),
            **{name: getattr(self, name) for name in kept},
            **{name: value for name in later if (value := getattr(self, name)) is not None},
            **({"plugins": plugins} if plugins else {}),
        }


def _stored_identity(folder: Path) -> Any:
    """Return the settings that make the study of a folder; None where no study lies there."""
    try:
        return json.loads((folder / "study.json").read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
