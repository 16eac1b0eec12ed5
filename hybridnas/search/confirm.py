"""Confirmation: the best architectures and the presets trained again with fresh seeds, at full length.

Runs lie in ``trials/NNNN/confirm/seedS/``, go on where they were stopped, and leave the weights of none; their
statistics are those of :mod:`hybridnas.analysis.confirmation`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.analysis.confirmation import trained_objective
from hybridnas.analysis.ranking import front
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import COMPLETE, TrialRecord

if TYPE_CHECKING:
    from hybridnas.search.trial import TrialContext


def chosen(records: Sequence[TrialRecord], top: int) -> list[TrialRecord]:
    """Return who is confirmed: the best ``top`` that were drawn, and every baseline that was trained to the end."""
    best = [record for record in front(records) if record.preset is None]
    best += sorted(filter(eligible, records), key=lambda record: (score(record), record.number))
    drawn = list({record.number: record for record in best if record.preset is None}.values())[:top]
    yardsticks = [record for record in records if record.preset is not None and record.state == COMPLETE]
    already = [record for record in records if record.confirmed]
    return list({record.number: record for record in (*yardsticks, *drawn, *already)}.values())


def fresh_seeds(seed: int, count: int) -> list[int]:
    """Return seeds that the search has not used."""
    return [seed + 1 + index for index in range(count)]


def confirm(
    context: TrialContext,
    records: Sequence[TrialRecord],
    folder: Callable[[int], Path],
    save: Callable[[TrialRecord], None],
) -> None:
    """Train whoever is chosen with every fresh seed, seed by seed; ``save`` takes each record as it grows.

    What was trained before is not trained again. A run that fails leaves None: its architecture cannot win.
    """
    budget = context.config.budget
    grown = {record.number: record for record in chosen(records, budget.confirm_top)}
    seeds = fresh_seeds(context.config.seed, budget.confirm_seeds)
    missing = [record.seconds for record in grown.values() for seed in seeds if str(seed) not in record.confirmed]
    if missing:
        context.news(f"confirming {len(grown)} architectures, {len(missing)} trainings: {_about(sum(missing))}")
    for seed in seeds:
        for number, record in grown.items():
            if str(seed) in record.confirmed:
                continue
            value = train_again(context, record, folder(number), seed)
            grown[number] = dataclasses.replace(record, confirmed={**record.confirmed, str(seed): value})
            save(grown[number])
            words = "failed" if value is None else f"{value:.4f}"
            context.news(f"confirming trial {number:>3}  {record.name}  seed {seed}: {words}")


def _about(seconds: float) -> str:
    return f"about {math.ceil(seconds / 60)} min" if seconds >= 60 else "under a minute"


def train_again(context: TrialContext, record: TrialRecord, folder: Path, seed: int) -> float | None:
    """Return what an architecture reaches with another seed at full length, in the first trained objective."""
    import json

    from hybridnas.arch.arch import Arch
    from hybridnas.train.loop import run as train_run

    arch = Arch.from_dict(json.loads((folder / "arch.json").read_text(encoding="utf-8")))
    config = context.config
    result = train_run(
        arch,
        context.source,
        config.budget.train_config(context.target, seed),
        folder=folder / "confirm" / f"seed{seed}",
        device=config.device,
        keep_checkpoint=False,
    )
    if result.status != "completed" or not result.evals:
        return None
    last = result.evals[-1]
    return last.accuracy if trained_objective(record) == "accuracy" else last.valid_loss
