"""The reference study of ``against=``: by default a random search that may train as many tokens as ours did."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybridnas.analysis.curves import best_so_far
from hybridnas.errors import StudyError
from hybridnas.search.confirm import at_own_rate, fresh_seeds, train_again, verdict_seeds
from hybridnas.study.folder import completed, read_study
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import CONFIRM, SEED_RESULTS, TrialRecord, load_records, trained_tokens, trial_folder
from hybridnas.study.reference import ReferenceStudy, read_reference_study, write_reference_study

if TYPE_CHECKING:
    from hybridnas.search.config import SearchConfig
    from hybridnas.search.session import Session

RANDOM = "random"
_MORE_TRIALS = 10  # a random search ends with the tokens; this many times our trials ends a space that is used up


def find_reference_study(
    session: Session,
    records: Iterable[TrialRecord],
    search: Callable[[SearchConfig], None],
    note: Callable[[str], None],
) -> ReferenceStudy | None:
    """Find the study that was asked for, or search at random where it must be made; None where none was asked for.

    ``search`` runs a search. Raises StudyError for a study that trained on other data, or longer, or has no winner.
    """
    config, study = session.config, session.folder.path
    if config.against is None:
        return None
    name = f"{study.name}-random" if config.against == RANDOM else completed(study.parent / config.against).name
    if config.against == RANDOM:
        tokens = trained_tokens(records)
        note(f"searching at random, too, for {tokens:,} trained tokens: study {name}")
        search(_at_random(config, name, tokens))
    folder = study.parent / name
    _check(folder, config.identity())
    theirs, _ = load_records(folder)
    drawn = [record for record in theirs if record.preset is None and eligible(record)]
    if not drawn:
        raise StudyError(f"study {name!r} has no candidate that was trained to the end; choose another against=STUDY")
    best = min(drawn, key=lambda record: (score(record), record.number))
    known = read_reference_study(study)
    if known is not None and known.record.fingerprint == best.fingerprint:
        best = dataclasses.replace(best, own_lr=known.record.own_lr, own_rates=known.record.own_rates)
    reference = ReferenceStudy(name, best, trained_tokens(theirs), best_so_far(theirs))
    if known is not None and known.record.fingerprint == best.fingerprint:
        reference = dataclasses.replace(reference, **{name: getattr(known, name) for name in SEED_RESULTS})
    write_reference_study(study, reference)
    return reference


def confirm_reference_study(
    session: Session, records: Iterable[TrialRecord], reference: ReferenceStudy, note: Callable[[str], None]
) -> ReferenceStudy:
    """Train the reference study's best with the seeds of our own confirmation and verdict, those that it lacks.

    Where it is one of our ``records``, what that was trained again is taken over: it would be the same to the bit.
    """
    study, config = session.folder.path, session.config
    folder = trial_folder(study.parent / reference.study, reference.record.number)
    _take_over(study, records, reference.record, folder)
    if config.budget.confirm_rates == "own" and not reference.record.own_rates and not reference.confirmed:
        reference = dataclasses.replace(reference, record=at_own_rate(session, reference.record, folder, note))
        write_reference_study(study, reference)
    fresh = fresh_seeds(config.seed, config.budget.confirm_seeds)
    further = verdict_seeds(config.seed, config.budget.verdict_seeds)
    asked: list[tuple[Literal["confirmed", "verdict"], int]] = [
        *(("confirmed", seed) for seed in fresh),
        *(("verdict", seed) for seed in further),
    ]
    for field, seed in asked:
        if str(seed) not in getattr(reference, field):
            again = train_again(session, reference.record, folder, seed)
            reference = again.added(reference, seed, field)
            write_reference_study(study, reference)
            note(f"confirming {reference.name}  {reference.record.name}  seed {seed}: {again}")
    return reference


def _take_over(study: Path, records: Iterable[TrialRecord], theirs: TrialRecord, folder: Path) -> None:
    """Copy the further trainings of the record that trained as ``theirs`` did into its folder; a part is not seen."""
    alike = [
        one for one in records if (one.fingerprint, one.seed, one.lr) == (theirs.fingerprint, theirs.seed, theirs.lr)
    ]
    target = folder / CONFIRM
    if not alike or target.exists():
        return
    ours = trial_folder(study, alike[0].number) / CONFIRM
    if ours.is_dir():
        part = target.with_name(f"{CONFIRM}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(ours, part)
        part.replace(target)


def _at_random(config: SearchConfig, name: str, tokens: int) -> SearchConfig:
    """Return the settings of a random search that may train so many tokens."""
    budget = config.budget.replace(
        n_trials=_MORE_TRIALS * config.budget.n_trials, max_tokens=max(1, tokens), minutes=None, confirm="off"
    )
    return config.replace(
        study=name, sampler="random", budget=budget, against=None, tracking="off", workers=1, worker="off"
    )


def _check(folder: Path, ours: Mapping[str, Any]) -> None:
    theirs = read_study(folder)["identity"]
    for part in ("data", "budget"):
        if theirs[part] != json.loads(json.dumps(ours[part])):
            raise StudyError(
                f"study {folder.name!r} has another {part} than this one, so their results cannot be compared; "
                f"choose another against=STUDY, or against=random",
                field="against",
                got=folder.name,
            )
