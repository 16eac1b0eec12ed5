"""Another study to be better than: by default a random search that may train as many tokens as ours did.

What is known of it lies in ``STUDY/against.json``: its best architecture, how its best fell with trained tokens, and
what that architecture reached with the fresh seeds of our confirmation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import StudyError
from hybridnas.search.confirm import train_again
from hybridnas.study.folder import read_study
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import DUPLICATE, TrialRecord, load_records, save, trained_tokens, trial_folder

if TYPE_CHECKING:
    from hybridnas.search.trial import TrialContext

FILE, RANDOM = "against.json", "random"
_MORE_TRIALS = 10  # the rival ends with the tokens, not with a count; this many times ours ends a space that is used up


@dataclass(frozen=True)
class Rival:
    """A study that ours is compared with, and its best."""

    study: str
    record: TrialRecord
    tokens: int  # trained by the whole study
    steps: Sequence[Sequence[float]]  # [trained tokens, best score so far], falling
    confirmed: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return what the report calls its best."""
        return f"the best of {self.study}"


def progress(records: Iterable[TrialRecord]) -> list[tuple[float, float]]:
    """Return how the best that a study drew fell: (tokens trained by then, best score of a full trial, less is better).

    Presets are left out, with their tokens: every study begins with the same ones.
    """
    events: list[tuple[float, float, float | None]] = []
    for record in records:
        if record.state == DUPLICATE or record.preset is not None:
            continue
        last = score(record) if eligible(record) else None
        for place, (when, tokens) in enumerate(record.legs):
            events.append((when, tokens, last if place == len(record.legs) - 1 else None))
    found: list[tuple[float, float]] = []
    trained = 0.0
    for _, tokens, value in sorted(events, key=lambda event: event[0]):
        trained += tokens
        if value is not None and (not found or value < found[-1][1]):
            found.append((trained, value))
    return found


def read_rival(study: Path) -> Rival | None:
    """Return the rival that a study was compared with; None where there was none, or its file is damaged."""
    try:
        values = json.loads((study / FILE).read_text(encoding="utf-8"))
        return Rival(**{**values, "record": TrialRecord.from_dict(values["record"])})
    except (OSError, ValueError, KeyError, TypeError, StudyError):
        return None


def meet(context: TrialContext, study: Path, records: Iterable[TrialRecord]) -> Rival | None:
    """Find the rival that was asked for, search at random where it must be made, and train its best with fresh seeds.

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
    known = read_rival(study)
    kept = known.confirmed if known is not None and known.record.fingerprint == best.fingerprint else {}
    rival = Rival(name, best, trained_tokens(theirs), progress(theirs), dict(kept))
    _write(study, rival)
    return rival


def confirm_rival(context: TrialContext, study: Path, rival: Rival, seeds: Sequence[int]) -> Rival:
    """Train the rival's best with the fresh seeds of our own best; what was trained before is not trained again."""
    folder = trial_folder(study.parent / rival.study, rival.record.number)
    for seed in seeds:
        if str(seed) not in rival.confirmed:
            value = train_again(context, rival.record, folder, seed)
            rival = dataclasses.replace(rival, confirmed={**rival.confirmed, str(seed): value})
            _write(study, rival)
            context.news(f"confirming {rival.name}  {rival.record.name}  seed {seed}: {_words(value)}")
    return rival


def _words(value: float | None) -> str:
    return "failed" if value is None else f"{value:.4f}"


def _write(study: Path, rival: Rival) -> None:
    values: dict[str, Any] = {**dataclasses.asdict(rival), "record": rival.record.to_dict()}
    save(study / FILE, json.dumps(values, indent=1) + "\n")


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
