"""What a suite is: tasks, architectures, a grid of optimiser settings, and published rows to stand beside ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError, suggest
from hybridnas.registry import Registry

if TYPE_CHECKING:  # names of suites are listed without torch
    from torch import nn

    from hybridnas.arch.arch import Arch

    Model = str | Arch | Callable[[int], nn.Module | Arch]  # what a user may give to a suite

S = Callable[[bool], "Suite"]
Fields = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data and a training schedule; tasks of one column are averaged in the table."""

    name: str
    column: str
    data: Fields  # of a SourceConfig
    train: Fields  # of a TrainConfig, all but lr, weight_decay and seed
    tokens_per_active: float | None = None  # training tokens per active parameter; none: train's tokens
    flops_of: str | None = None  # train with the FLOPs that this pattern of the suite's fields needs for train's tokens
    measurements: int = 0  # even points at which a run is measured; none: train's eval_at
    lengths: tuple[int, ...] = ()  # lengths at which the trained model's accuracy is measured

    @property
    def digest(self) -> str:
        """Eight hex digits of all that makes two trainings comparable: data and schedule."""
        data = dict(self.data)
        if "path" in data:  # the same files may lie elsewhere
            data["path"] = Path(data["path"]).name
        identity: dict[str, Any] = {"data": data, "train": dict(self.train), "per_active": self.tokens_per_active}
        identity |= {"measurements": self.measurements} if self.measurements else {}
        identity |= {"flops_of": self.flops_of} if self.flops_of else {}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of a suite, by its name in tables: a pattern or a preset with fields, or one of the user's own."""

    name: str
    pattern: str | None = None
    preset: str | None = None
    model: Callable[[int], nn.Module | Arch] | None = None  # built for a vocabulary size
    fields: Fields = field(default_factory=dict)
    active_params: int | None = None  # size the free widths to this many active parameters
    free: tuple[str, ...] = ("d_expert", "d_ff")
    rates: tuple[float, ...] | None = None  # none: the suite's
    seeds: tuple[int, ...] | None = None  # none: the suite's
    tasks: tuple[str, ...] = ()  # names of the tasks that it is trained on; none: all

    def learns(self, task: Task) -> bool:
        """Whether it is trained on a task."""
        return not self.tasks or task.name in self.tasks

    def sizes(self) -> set[str]:
        """Return the fields that its blocks have, and d_model."""
        from hybridnas.registry import BLOCKS

        free = replace(self, active_params=None, fields={"d_model": 16, **self.fields})
        arch = free.arch(vocab_size=16)
        slots = arch.pattern.slots if arch is not None else ()
        return {"d_model", *(name for slot in slots for name in BLOCKS.get(slot.letter).Config.field_names())}

    def arch(self, vocab_size: int) -> Arch | None:
        """Return the architecture for a vocabulary, or None for a module of the user's own.

        Raises PatternError, ConfigError or MatchError.
        """
        from hybridnas.arch.arch import Arch
        from hybridnas.arch.match import match
        from hybridnas.arch.presets import preset

        if self.model is not None:
            made = self.model(vocab_size)
            return made if isinstance(made, Arch) else None
        fields = {**self.fields, "vocab_size": vocab_size}
        arch = preset(self.preset, **fields) if self.preset else Arch.from_pattern(self.pattern or "", **fields)
        if self.active_params is None:
            return arch
        return match(arch, active_params=self.active_params, free=self.free, multiple=1)

    def module(self, vocab_size: int) -> nn.Module:
        """Return a fresh module of the user's own; raises ConfigError for anything else."""
        from torch import nn

        made = self.model(vocab_size) if self.model is not None else None
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"model {self.name!r} must build a torch module or an Arch, got {type(made).__name__}",
                field="model",
                got=type(made).__name__,
                allowed=["torch.nn.Module", "Arch"],
            )
        return made


@dataclass(frozen=True, kw_only=True)
class Published:
    """A row as printed by others: figures by column, with source and settings.

    Figures of a column of the suite are in its unit (accuracies in per cent); other columns say theirs.
    """

    model: str
    values: Mapping[str, float]
    source: str
    settings: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks, architectures and the grid; every architecture is judged at its own best setting of the grid."""

    name: str
    title: str
    tasks: tuple[Task, ...]
    entries: tuple[Entry, ...]  # trained where the user names no architecture
    rates: tuple[float, ...]
    decays: tuple[float, ...] = (0.0,)
    seeds: tuple[int, ...] = (0,)  # the first searches the grid, the others repeat its best setting
    score: str = "accuracy"  # or valid_loss: what is compared, tabulated and drawn
    fields: Fields = field(default_factory=dict)  # of architectures that the user names by pattern
    active_params: int | None = None  # to which these are sized: experts and MLPs, else the Mamba layers
    variants: tuple[Fields, ...] = ({},)  # each architecture once with each of these: a sweep of widths or states
    stop_at: float | None = None  # accuracy that ends a training early
    published: tuple[Published, ...] = ()
    figure: str = "tasks"  # tasks | widths | state | curves | lengths | contexts
    baseline: str | None = None  # whose final loss the others' steps are measured against
    notes: tuple[str, ...] = ()  # how this differs from the papers, printed under the table
    unit: str = ""  # what a token is, such as base: losses are shown in bits of it rather than nats of a token
    files: str = ""  # of a suite that reads files: what they are and how they are had

    def __post_init__(self) -> None:
        if self.score not in ("accuracy", "valid_loss"):
            raise ConfigError(f"suite {self.name!r} score={self.score!r} must be accuracy or valid_loss")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table, in the order of the tasks."""
        return tuple(dict.fromkeys(task.column for task in self.tasks))

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return self.score == "accuracy"

    def best(self, scores: Sequence[float]) -> float:
        """Return the better of several scores."""
        return max(scores) if self.higher else min(scores)

    def expanded(self, architectures: Sequence[str], fields: Fields) -> tuple[Entry, ...]:
        """Return what to train: the user's patterns and presets, or the suite's own, each in every variant."""
        from hybridnas.arch.presets import list_presets

        chosen = [self._named(text, fields, text in list_presets()) for text in architectures]
        entries = chosen or [replace(e, fields={**e.fields, **fields}) for e in self.entries]
        swept = (_variant(entry, variant) for entry in entries for variant in self.variants)
        return tuple({entry.name: entry for entry in swept}.values())  # sizes that a pattern lacks do not repeat it

    def _named(self, text: str, fields: Fields, is_preset: bool) -> Entry:
        if is_preset:
            own = {key: value for key, value in self.fields.items() if key == "d_model"}
            entry = Entry(name=text, preset=text, fields={**own, **fields})
        else:
            entry = Entry(name=text, pattern=text, fields={**self.fields, **fields})
        if self.active_params is None:
            return entry
        free = tuple(sorted(entry.sizes() & {"d_expert", "d_ff"})) or ("d_inner",)
        return replace(entry, active_params=self.active_params, free=free)

    def entries_of(self, name: str, model: Model) -> tuple[Entry, ...]:
        """Return what to train of one model: text is a pattern or preset, in every variant of the suite."""
        from hybridnas.arch.arch import Arch

        if isinstance(model, str):
            entries = self.expanded([model], {})
            return tuple(replace(entry, name=entry.name.replace(model, name, 1)) for entry in entries)
        if isinstance(model, Arch):
            arch = model
            return (Entry(name=name, model=lambda vocab_size: arch.replace(vocab_size=vocab_size)),)
        if not callable(model):
            raise ConfigError(
                f"model {name!r} must be a pattern, a preset, an Arch or a function of the vocabulary size, "
                f"got {type(model).__name__}",
                field="model",
                got=type(model).__name__,
            )
        return (Entry(name=name, model=model),)

    def only(self, tasks: Sequence[str]) -> Suite:
        """Keep the tasks or columns of these names; raises ConfigError for others."""
        known = dict.fromkeys(name for task in self.tasks for name in (task.column, task.name))
        for name in tasks:
            if name not in known:
                raise ConfigError(
                    f"suite {self.name!r} has no task {name!r}{suggest(name, known)}",
                    field="suite.tasks",
                    got=name,
                    allowed=tuple(known),
                )
        kept = tuple(task for task in self.tasks if not tasks or {task.name, task.column} & set(tasks))
        return replace(self, tasks=kept)


def _variant(entry: Entry, variant: Fields) -> Entry:
    """Give an architecture the sizes of a sweep that it has and that the user has not set, and say so in its name."""
    known = entry.sizes()
    own = {key: value for key, value in variant.items() if key in known and key not in entry.fields}
    if not own:
        return entry
    words = ", ".join(f"{key} {value}" for key, value in own.items())
    return replace(entry, name=f"{entry.name}, {words}", fields={**entry.fields, **own})


SUITES: Registry[S] = Registry("suite", "hybridnas.suites", groups=("hybridnas.suites",))


def register_suite(name: str) -> Callable[[S], S]:
    """Decorate a function that returns the suite, full or quick."""

    def decorate(make: S) -> S:
        SUITES.add(name, make)
        return make

    return decorate


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(FrozenConfig):
    """What the user says about a suite; empty lists and none keep the suite's own."""

    prefix: ClassVar[str] = "suite"

    name: str = option(doc="name of the suite")
    quick: bool = option(False, "a smaller grid and shorter trainings: minutes on two cores instead of days [yes/no]")
    tasks: tuple[str, ...] = option((), "tasks or columns to run; none: all")
    rates: tuple[float, ...] = option((), "learning rates of the grid; none: the suite's")
    decays: tuple[float, ...] = option((), "weight decays of the grid; none: the suite's")
    seeds: tuple[int, ...] = option((), "seeds; the first searches the grid; none: the suite's")
    tokens: int | None = option(None, "training tokens of every run; none: the suite's [tokens]", ge=1)
    path: str | None = option(
        None, "file, folder or glob of a suite that reads files; none: where the Debian package that it names has them"
    )
    minutes: float | None = option(
        None, "stop after this long; the same command goes on; none: the command's quick=true alone after 2 [min]", gt=0
    )
    runs: Path = option(Path("runs"), "folder in which the runs lie")
    out: Path | None = option(None, "CSV of the results, figures beside it; none: RUNS/SUITE/SUITE.csv")
    against: Path | None = option(None, "CSV of another version of the suite: print rank correlations, train nothing")

    @classmethod
    def label(cls) -> str:
        return "suite"

    @property
    def folder_name(self) -> str:
        """The folder of the suite's runs within ``runs``."""
        return f"{self.name}-quick" if self.quick else self.name

    def suite(self) -> Suite:
        """Return the suite as the user wants it; raises ConfigError for unknown names."""
        return self.applied(SUITES.get(self.name)(self.quick))

    def applied(self, suite: Suite) -> Suite:
        """Return a suite with these tasks, grid and tokens; raises ConfigError for unknown tasks."""
        suite = suite.only(self.tasks)
        if self.path is not None:
            suite = self._reading(suite, self.path)
        grid: dict[str, Any] = {name: getattr(self, name) for name in _LISTS[1:] if getattr(self, name)}
        own: dict[str, Any] = {name: None for name in ("rates", "seeds") if getattr(self, name)}
        grid["entries"] = tuple(replace(entry, **own) for entry in suite.entries)
        if self.tokens is not None:
            tasks = (replace(task, train=_shortened(task.train, self.tokens)) for task in suite.tasks)
            grid["tasks"] = tuple(replace(task, tokens_per_active=None) for task in tasks)
        return replace(suite, **grid)

    @staticmethod
    def _reading(suite: Suite, path: str) -> Suite:
        if not suite.files:
            raise ConfigError(
                f"suite.path={path!r} goes with a suite that reads files; {suite.name!r} makes its own data",
                field="suite.path",
                got=path,
            )
        return replace(suite, tasks=tuple(replace(task, data={**task.data, "path": path}) for task in suite.tasks))


_LISTS = ("tasks", "rates", "decays", "seeds")


def _shortened(train: Fields, tokens: int) -> dict[str, Any]:
    """Return a schedule of so many tokens, measured at the same points as far as it goes."""
    points = [point for point in train.get("eval_at", ()) if point < tokens]
    return {**train, "tokens": tokens, "eval_at": points}
