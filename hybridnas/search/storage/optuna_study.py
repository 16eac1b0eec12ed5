"""The Optuna study behind a search: opened or resumed, its queue filled, what a death left in it found."""

from __future__ import annotations

import secrets
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.search.config import SearchConfig
from hybridnas.search.pruning.promotion import continues
from hybridnas.search.sampling.samplers import make_pruner, make_sampler
from hybridnas.search.storage.journal import open_journal
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.space import Scale, Space
from hybridnas.study.folder import StudyFolder
from hybridnas.study.objectives import directions

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage


def open_study(
    config: SearchConfig,
    folder: StudyFolder,
    space: Space,
    scale: Scale,
    target: int,
    worker: int | None = None,
    storage: RDBStorage | None = None,
) -> optuna.Study:
    """Open or make the study in the folder's journal or a database, its baselines queued first.

    ``worker``: one that its command has made already, for a worker of this number.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    budget = config.budget
    path = folder.path / "journal.log"
    if worker is None and storage is None:
        folder.journal()
    study = optuna.create_study(
        study_name=folder.name,
        storage=storage or open_journal(path),
        # A resumed process must not repeat the draws of the first, nor a worker those of another.
        sampler=make_sampler(config.sampler, _seed(config, path, worker, storage), space, scale),
        pruner=make_pruner(config.pruner, budget.rung_tokens(target)),
        directions=directions(config.objectives),
        load_if_exists=True,
    )
    if worker is None:
        _queue(study, config, space, scale)
    return study


def _queue(study: optuna.Study, config: SearchConfig, space: Space, scale: Scale) -> None:
    known = {trial.user_attrs.get("baseline") for trial in study.trials}
    for name in space.baselines:
        if name not in known:
            study.enqueue_trial({}, user_attrs={"baseline": name})
    if config.sampler == "bruteforce" and not study.user_attrs.get("enumerated"):
        asked = [trial.system_attrs.get("fixed_params") for trial in study.trials]  # by a process that died here
        for choices in every_choice(space, scale):
            if choices not in asked:
                study.enqueue_trial(choices)
        study.set_user_attr("enumerated", True)


def repeat_lost(study: optuna.Study, recorded: Container[int]) -> None:
    """Queue again what the journal calls finished but whose record is gone or damaged."""
    asked = {trial.user_attrs.get("repeats") for trial in study.trials}
    for trial in study.trials:
        own = continues(trial) is None  # what goes on with another has no record of its own
        if own and trial.state.is_finished() and trial.number not in recorded and trial.number not in asked:
            attributes = {key: value for key, value in trial.user_attrs.items() if key == "baseline"}
            study.enqueue_trial(trial.params, user_attrs={**attributes, "repeats": trial.number})


def _seed(config: SearchConfig, path: Path, worker: int | None, storage: RDBStorage | None) -> int:
    if storage is not None:  # workers come from anywhere and know nothing of each other
        return secrets.randbelow(2**31)
    return (config.seed + 7919 * _line_count(path) + 104_729 * (worker or 0)) % 2**31


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
