"""The reference study of ``against=``: by default a random search that may train as many tokens as ours did."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.curves import best_so_far
from hybridnas.errors import StudyError
from hybridnas.search.confirm import train_again
from hybridnas.study.folder import read_study
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import TrialRecord, load_records, trained_tokens, trial_folder
from hybridnas.study.reference import ReferenceStudy, read_reference_study, write_reference_study

if TYPE_CHECKING:
    from hybridnas.search.trial import TrialContext

RANDOM = "random"
_MORE_TRIALS = 10  # a random search ends with the tokens; this many times our trials ends a space that is used up


def find_reference_study(context: TrialContext, study: Path, records: Iterable[TrialRecord]) -> ReferenceStudy | None:
    """Find the study that was asked for, or search at random where it must be made; None where none was asked for.

    Raises StudyError for a study that trained on other data, or longer, or that has no winner.
    """
    config = context.config
    if config.against is None:
        return None
    name = f"{study.name}-random" if config.against == RANDOM else config.against
    if config.against == RANDOM:
        _search_at_random(context, name, trained_tokens(records))
    folder = study.parent / name
    _check(folder, config.identity())
    theirs, _ = load_records(folder)
    drawn = [record for record in theirs if record.preset is None and eligible(record)]
    if not drawn:
        raise StudyError(f"study {name!r} has no candidate that was trained to the end; choose another against=STUDY")
    best = min(drawn, key=lambda record: (score(record), record.number))
    known = read_reference_study(study)
    kept = known.confirmed if known is not None and known.record.fingerprint == best.fingerprint else {}
    reference = ReferenceStudy(name, best, trained_tokens(theirs), best_so_far(theirs), dict(kept))
    write_reference_study(study, reference)
    return reference


def confirm_reference_study(
    context: TrialContext, study: Path, reference: ReferenceStudy, seeds: Sequence[int]
) -> ReferenceStudy:
    """Train the reference study's best with the fresh seeds of our own best, those that it has not trained yet."""
    folder = trial_folder(study.parent / reference.study, reference.record.number)
    for seed in seeds:
        if str(seed) not in reference.confirmed:
            value = train_again(context, reference.record, folder, seed)
            reference = dataclasses.replace(reference, confirmed={**reference.confirmed, str(seed): value})
            write_reference_study(study, reference)
            context.news(f"confirming {reference.name}  {reference.record.name}  seed {seed}: {_words(value)}")
    return reference


def _words(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _search_at_random(context: TrialContext, name: str, tokens: int) -> None:
    from hybridnas.search.runner import Search

    config = context.config
    budget = config.budget.replace(
        n_trials=_MORE_TRIALS * config.budget.n_trials, max_tokens=max(1, tokens), minutes=None, confirm="off"
    )
    context.news(f"searching at random, too, for {tokens:,} trained tokens: study {name}")
    own = {"study": name, "sampler": "random", "budget": budget, "against": None, "tracking": "off", "workers": 1}
    Search(config.replace(**own), context.news).run()


def _check(folder: Path, ours: Mapping[str, Any]) -> None:
    theirs = read_study(folder)["identity"]
    for part in ("data", "budget"):
        if theirs[part] != json.loads(json.dumps(ours[part])):
            raise StudyError(
                f"study {folder.name!r} has another {part} than this one, so their results cannot be compared; "
                f"choose another against=STUDY, or against=random"
            )
