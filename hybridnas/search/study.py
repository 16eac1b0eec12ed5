"""The Optuna study behind a search: opened or resumed, its queue filled, what a death left in it found."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.search.config import SearchConfig
from hybridnas.search.folder import StudyFolder
from hybridnas.search.samplers import make_pruner, make_sampler
from hybridnas.search_spaces.enumerate import every_choice
from hybridnas.search_spaces.space import Scale, Space

if TYPE_CHECKING:
    import optuna


def open_study(config: SearchConfig, folder: StudyFolder, space: Space, scale: Scale, target: int) -> optuna.Study:
    """Open or make the study in the folder's journal, its baselines queued first."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    budget = config.budget
    path = folder.journal()
    study = optuna.create_study(
        study_name=folder.name,
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(path))),
        # A resumed process must not repeat the draws of the first, so the count of trials enters the seed.
        sampler=make_sampler(config.sampler, config.seed + 7919 * _line_count(path)),
        pruner=make_pruner(config.pruner, budget.rung_tokens(target), budget.reduction),
        direction="minimize",
        load_if_exists=True,
    )
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
    return study


def repeat_lost(study: optuna.Study, recorded: Container[int]) -> None:
    """Queue again what the journal calls finished but whose record is gone or damaged."""
    asked = {trial.user_attrs.get("repeats") for trial in study.trials}
    for trial in study.trials:
        if trial.state.is_finished() and trial.number not in recorded and trial.number not in asked:
            attributes = {key: value for key, value in trial.user_attrs.items() if key == "baseline"}
            study.enqueue_trial(trial.params, user_attrs={**attributes, "repeats": trial.number})


def interrupted(study: optuna.Study) -> Iterator[optuna.Trial]:
    """Yield trials that were running when their process died: their choices stand, their checkpoints go on."""
    from optuna.trial import Trial, TrialState

    for frozen in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        yield Trial(study, frozen._trial_id)


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
