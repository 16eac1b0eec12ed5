"""Open a study: lock, data, records, plan and trainer; everything is closed on exit, also after an error."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas import plugins
from hybridnas.data import open_source, source_config
from hybridnas.errors import ConfigError, HybridNASError, StudyError
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.search.config import SearchConfig
from hybridnas.search.feasible import Share, estimate
from hybridnas.search.latency import Meter
from hybridnas.search.plan import Plan
from hybridnas.search.sampling.candidates import RULES, Candidates
from hybridnas.search.storage.folder_store import FolderStore
from hybridnas.search.storage.store import RecordStore
from hybridnas.search.table import TableSource, TableTrainer, on_table
from hybridnas.search.training import CellTrainer
from hybridnas.search.trial import Trainer
from hybridnas.search_spaces.fit import TOLERANCE
from hybridnas.search_spaces.space import Space
from hybridnas.study.folder import StudyFolder
from hybridnas.study.objectives import OF_LENGTH, counted_limits
from hybridnas.study.records import StudyMeta, reference_of
from hybridnas.tracking.secrets import masked
from hybridnas.train.callbacks import Callback

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.data import Source, SourceConfig
    from hybridnas.search.workers.orders import Orders

log = logging.getLogger("hybridnas.search")

RULE_DRAWS, RULE_SECONDS = 60, 0.3  # for the share of a space without limits


@dataclass(frozen=True)
class Settings:
    """The settings of a search, read and checked before any folder is made."""

    config: SearchConfig
    space: Space
    table: TableSource | None
    data: SourceConfig

    @classmethod
    def of(cls, config: SearchConfig) -> Settings:
        """Read a search's settings; raises ConfigError, or StudyError for a table that is missing."""
        config = config.replace(study=config.name)  # now: what follows changes settings that the name is made of
        space = Space.from_mapping(config.space)
        table = None
        if space.table:
            config, table = on_table(config, space)
        data = source_config(config.data)
        _check_lengths(config)
        seq_len = data.own_seq_len or config.budget.seq_len  # a task's examples have their own length
        config = config.replace(budget=config.budget.replace(seq_len=seq_len))
        pick_device(config.device)
        return cls(config, space, table, data)


@dataclass(frozen=True)
class Session:
    """An open study."""

    config: SearchConfig
    space: Space
    folder: StudyFolder
    meta: StudyMeta
    identity: Mapping[str, Any]
    source: Source
    target: int  # active parameters that candidates are matched to
    plan: Plan
    store: RecordStore
    trainer: Trainer
    share: Share | None = None  # how much of the space keeps its rules and limits, where it was asked

    @property
    def on_table(self) -> bool:
        """Whether scores are looked up, so that nothing is trained, confirmed or exported."""
        return isinstance(self.source, TableSource)


@contextmanager
def open_session(
    settings: Settings,
    *,
    orders: Orders | None = None,
    elapsed: Callable[[], float] = lambda: 0.0,
    note: Callable[[str], None] = log.info,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Session]:
    """Open a study, or make it. ``orders``: of the command whose worker this process is.

    Raises StudyError for a folder that is busy, damaged, or of another study; then nothing in it has changed. A new
    study that is refused leaves no folder.
    """
    config, space = settings.config, settings.space
    folder = StudyFolder(Path(config.runs).expanduser(), config.name)
    begun = folder.path.exists()
    stored = _enter(folder, config, orders)
    store: RecordStore | None = None
    meter = Meter() if config.hardware and settings.table is None else None
    try:
        if meter is not None:
            meter.start()
        source = settings.table or open_source(settings.data)
        if orders is None:
            stored = folder.add_facts(stored, {"data_fingerprint": source.fingerprint})
        plan = make_plan(settings, source)
        target = space.target(plan.candidates.scale)
        share = None
        if orders is None and settings.table is None and config.worker != "join":
            share = _share(stored, config, space, plan)
        worker = 0 if orders is None else orders.worker + 1
        limits = _limits(config, elapsed()) if orders is None and config.worker == "off" else None
        store = _store(config, folder, stored, worker, limits, note)
        trainer: Trainer
        if settings.table is not None:
            trainer = TableTrainer(settings.table, plan.rungs, folder.path)
        else:
            trainer = CellTrainer(folder.path, config, source, target, callbacks, meter)
        meta = _meta(config, space, folder, stored, source, target)
        if orders is None:  # nothing can be refused any more: what this call may change is written now
            known = {"limits": limits, "feasible": None if share is None else dataclasses.asdict(share)}
            kept = {name: value for name, value in known.items() if value is not None}
            folder.keep(meta=dataclasses.asdict(meta), **kept)
            if config.worker == "off":
                folder.admit_workers()
    except BaseException as error:
        refused = isinstance(error, HybridNASError) and orders is None and config.worker == "off"
        if refused and not begun:  # there is no such study
            shutil.rmtree(folder.path, ignore_errors=True)
        _close(meter, store, folder)
        raise
    try:
        yield Session(config, space, folder, meta, config.identity(), source, target, plan, store, trainer, share)
    finally:
        _close(meter, store, folder)


def _close(meter: Meter | None, store: RecordStore | None, folder: StudyFolder) -> None:
    if meter is not None:
        meter.close()
    if store is not None:
        store.close()
    folder.close()


def _share(stored: Mapping[str, Any], config: SearchConfig, space: Space, plan: Plan) -> Share | None:
    """Return how much of the space is feasible, as it was found before or by drawing; raises ConfigError for none.

    None where nothing could be refused: no limit, and no rule of the space.
    """
    known = stored.get("feasible")
    if isinstance(known, Mapping):
        return Share(**known)
    rules = [name for name in RULES if getattr(space, name, None)]
    if plan.candidates.limits:
        return estimate(plan.candidates, config.seed)
    return estimate(plan.candidates, config.seed, RULE_DRAWS, RULE_SECONDS) if rules else None


def _check_lengths(config: SearchConfig) -> None:
    """Raise ConfigError for a new study with a limit that means nothing without the context at which it holds."""
    lacking = [name for name in config.limits if name in OF_LENGTH]
    begun = (Path(config.runs).expanduser() / config.name / "study.json").exists()
    if lacking and config.state_length is None and not begun:
        raise ConfigError(
            f"search {lacking[0]}={config.limits[lacking[0]]:g} needs state_length, the context at which it holds, "
            f"e.g. state_length=4096",
            field="state_length",
            got=None,
            allowed=">= 1",
        )


def _check_sizes(config: SearchConfig, space: Space, target: int) -> None:
    """Raise ConfigError for a limit on parameters that contradicts the size to which candidates are matched."""
    for name in ("max_active_params", "max_params"):
        most = config.limits.get(name)
        if space.match and most is not None and most < (1 - TOLERANCE) * target:
            raise ConfigError(
                f"search {name}={most:,.0f} contradicts the size of the candidates, which are matched to {target:,} "
                f"active parameters each; raise it, or choose a smaller budget.active_params",
                field=name,
                got=most,
                allowed=f">= {target}",
            )


def make_plan(settings: Settings, source: Source) -> Plan:
    """Return what the search decides by."""
    config, space, budget = settings.config, settings.space, settings.config.budget
    scale = budget.scale(source.vocab_size)
    space.check(scale)
    _check_sizes(config, space, space.target(scale))
    return Plan(
        candidates=Candidates(
            space,
            scale,
            settings.table.require if settings.table is not None else _trainable,
            limits=counted_limits(config.limits),
            state_length=config.state_length,
        ),
        rungs=budget.rung_tokens(space.target(scale)),
        reduction=budget.reduction,
        n_trials=budget.n_trials,
        seed=config.seed,
        sampler=config.sampler,
        pruner=config.pruner,
        objectives=config.objectives,
        limits=config.limits,
        state_length=config.state_length,
        rate=budget.rate,
        lr=budget.lr,
        hardware=config.hardware,
        presets=() if budget.train_baselines == "none" else space.baselines,
        train_baselines=budget.train_baselines,
        minutes=budget.minutes,
        max_tokens=budget.max_tokens,
    )


def _trainable(arch: Arch) -> None:
    """Raise ConfigError for an architecture that sees later tokens: a search has no setting that would allow it."""
    from hybridnas.train.objective import why_noncausal

    reason = why_noncausal(arch)
    if reason is not None:
        raise ConfigError(reason, field="space", got=str(arch.pattern), allowed="causal blocks")


def _enter(folder: StudyFolder, config: SearchConfig, orders: Orders | None) -> dict[str, Any]:
    if orders is not None:
        return folder.join(orders.token)
    place = "folder" if config.storage is None else "database"
    facts: dict[str, Any] = {
        "machine": describe_machine(),
        "command": _command(),
        "directory": str(Path.cwd()),
        "versions": _versions(),
        "storage": place,
    }
    used = plugins.stored(config.identity().get("plugins", ()))
    if used:
        facts["plugin_files"] = used
    stored = folder.open(config.identity(), facts, shared=config.worker != "off")
    if stored.get("storage", place) != place:
        folder.close()
        advice = "give storage=URL or storage=env" if place == "folder" else "leave storage= out"
        raise StudyError(
            f"study folder {folder.path} is of a study whose records lie in the {stored['storage']}; {advice}, or "
            f"choose study=NEWNAME",
            field="storage",
            got=place,
            allowed=stored["storage"],
        )
    return stored


def _limits(config: SearchConfig, elapsed: float) -> dict[str, Any]:
    budget = config.budget
    kept = {"n_trials": budget.n_trials, "minutes": budget.minutes, "max_tokens": budget.max_tokens}
    return {**kept, "workers": config.trainers, "since": time.time() - elapsed}


def _store(
    config: SearchConfig,
    folder: StudyFolder,
    stored: Mapping[str, Any],
    worker: int,
    limits: Mapping[str, Any] | None,
    note: Callable[[str], None],
) -> RecordStore:
    from hybridnas.search.storage.database import SqlStore, database_url

    url = database_url(config.storage)
    if url is None:
        return FolderStore(folder.path, worker)
    store = SqlStore(url, folder.path, config.heartbeat, worker, note=note, patient=worker > 0)
    try:
        if worker == 0:
            store.agree(config.identity(), str(stored["data_fingerprint"]), limits)
    except BaseException:
        store.close()
        raise
    return store


def _meta(
    config: SearchConfig,
    space: Space,
    folder: StudyFolder,
    stored: Mapping[str, Any],
    source: Source,
    target: int,
) -> StudyMeta:
    budget = config.budget
    return StudyMeta(
        name=folder.name,
        space=space.name,
        data=source.describe(),
        budget=budget.name,
        reference=reference_of({"identity": {"space": config.space}}),
        alpha=budget.alpha,
        schedule=budget.schedule,
        rate=budget.rate,
        lr=budget.lr,
        active_params=target,
        tokens=budget.rung_tokens(target)[-1],
        seq_len=budget.seq_len,
        state_length=config.state_length or 0,
        batch_size=budget.batch_size,
        n_trials=budget.n_trials,
        seed=config.seed,
        sampler=config.sampler,
        pruner=config.pruner,
        command=stored.get("command", ""),
        machine=stored.get("machine", ""),
        versions=stored.get("versions", {}),
        started=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(stored.get("created"))),
        folder=str(folder.path),
        from_table=isinstance(source, TableSource),
        kind=str(config.data.get("kind", "")),
        bits_per=source.bits(0)[1],
        bits_tokens=1 if source.unit is None else source.unit[1],
    )


def _command() -> str:
    """Return the command that runs this process; empty where it is no command of ours, such as a notebook."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.stem == "hybridnas" or program.parts[-2:] == ("hybridnas", "__main__.py"):
        arguments = arguments[1:]  # hybridnas search ...
    elif program.parts[-3:] != ("hybridnas", "search", "__main__.py"):
        return ""
    return " ".join(["python -m hybridnas.search", *(shlex.quote(str(masked(argument))) for argument in arguments)])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("hybridnas", "torch", "optuna", "mlflow", "numpy")}
