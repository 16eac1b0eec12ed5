"""Entering a study: its folder held, its data open, its trials known, its mirror started; and leaving it again."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hybridnas.data import open_source
from hybridnas.hardware import describe_machine
from hybridnas.search.storage.optuna_study import open_study, repeat_lost
from hybridnas.search.storage.postgres import DatabaseCrew, agree, database_url, open_database
from hybridnas.search.trial import TrialContext
from hybridnas.study.folder import first_difference
from hybridnas.study.records import StudyMeta, load_records
from hybridnas.tracking.mlflow import open_tracker
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.tracker import BackgroundTracker

if TYPE_CHECKING:
    import optuna

    from hybridnas.data import Source
    from hybridnas.search.runner import Search
    from hybridnas.search_spaces.space import Scale


@contextmanager
def opened(search: Search) -> Iterator[tuple[optuna.Study, TrialContext, StudyMeta]]:
    """Open a search's study, and leave folder, database and MLflow closed whatever happens."""
    stored = _enter(search)
    tracker: BackgroundTracker | None = None
    config, folder = search.config, search.folder
    try:
        source = search.table or open_source(search.source_config)
        # MLflow's start takes seconds; it runs beside the first trial, after everything else is imported.
        tracker = open_tracker(_tracking(search), folder.path, folder.name, config.identity())
        if search.orders is None:
            stored = folder.add_facts(stored, {"data_fingerprint": source.fingerprint})
        scale = config.budget.scale(source.vocab_size)
        target = search.space.target(scale)
        loaded, search.warnings = load_records(folder.path)
        search.records = {record.number: record for record in loaded}
        study = _study(search, source, scale, target)
        tracker.sync(search.records.values())  # what a kill or an outage kept from MLflow
        context = TrialContext(
            config, search.space, scale, source, tracker, target, search.news, lambda: search.by_now(study)
        )
        yield study, context, search.meta(stored, context)
    except BaseException:
        if tracker is not None:
            tracker.close("FAILED")
        raise
    finally:
        search.crew.close()
        folder.close()


def _enter(search: Search) -> dict[str, Any]:
    if search.orders is not None:
        return search.folder.join(search.orders.token)
    config = search.config
    facts = {"machine": describe_machine(), "command": _command(), "versions": _versions()}
    stored = search.folder.open(config.identity(), facts, shared=config.worker != "off")
    return search.folder.limits(stored, _limits(search)) if config.worker == "off" else stored


def _limits(search: Search) -> dict[str, Any]:
    budget = search.config.budget
    kept = {"n_trials": budget.n_trials, "minutes": budget.minutes, "max_tokens": budget.max_tokens}
    return {**kept, "workers": search.config.workers, "since": time.time() - search.elapsed}


def _tracking(search: Search) -> str | None:
    """Return where to mirror to: workers beside each other write no sqlite file, only a server that was named."""
    alone = search.config.worker == "off" and search.orders is None
    return search.config.tracking if alone or search.config.tracking else "off"


def _study(search: Search, source: Source, scale: Scale, target: int) -> optuna.Study:
    """Open the study where it lies; the first to come makes it, and fills its queue."""
    config, folder = search.config, search.folder
    worker = None if search.orders is None else search.orders.worker + 1
    url = database_url(config.storage)
    if url is None:
        with search.crew.taking():
            study = open_study(config, folder, search.space, scale, target, worker)
            search.crew.refresh(study, search.records)
            if config.worker == "off" and worker is None:
                repeat_lost(study, search.records)
        return study
    storage = open_database(url, config.heartbeat, search.news, known=search.orders is not None)
    search.crew.close()
    search.crew = crew = DatabaseCrew(folder.path, storage, folder.name, config.heartbeat, worker or 0)
    limits = _limits(search) if config.worker == "off" and worker is None else None
    card = {"identity": config.identity(), "data_fingerprint": source.fingerprint, "limits": limits}
    with crew.taking():
        study = open_study(config, folder, search.space, scale, target, worker, storage=storage)
        agree(study, card, difference=first_difference)
        crew.refresh(study, search.records)
        if limits is not None:
            repeat_lost(study, search.records)
    return study


def _command() -> str:
    arguments = [shlex.quote(str(masked(argument))) for argument in sys.argv[1:]]
    return " ".join(["python -m hybridnas.search", *arguments])


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("hybridnas", "torch", "optuna", "mlflow", "numpy")}
