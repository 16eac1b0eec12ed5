"""Would other seeds say the same: the best and the baselines trained again with fresh seeds, and compared in pairs.

The search chose its best by the results of one seed, so that seed's results are too good for whoever was chosen; none
of them enters here. A seed decides weights and the order of the data, so two architectures trained with the same seed
are a pair. Runs lie in ``trials/NNNN/confirm/seedS/``, go on where they were stopped, and leave the weights of none.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.study.objectives import OBJECTIVES, TRAINED, eligible, front, objectives_of, score
from hybridnas.study.records import COMPLETE, TrialRecord

if TYPE_CHECKING:
    from hybridnas.search.trial import TrialContext

LEVEL = 0.95  # of intervals
ENOUGH = 2  # seeds that a mean must have before it decides anything


@dataclass(frozen=True)
class Paired:
    """The difference of two architectures over the seeds that both were trained with; negative: the first is better."""

    n: int
    mean: float
    half: float | None  # half the width of the paired t interval; None with fewer than two pairs

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half is not None and abs(self.mean) > self.half

    def words(self, first: str, second: str, unit: str = "nats per token") -> str:
        """Return the sentence that says which is better and whether that is more than noise."""
        if self.half is None:
            return f"{first} and {second} have {self.n} seeds in common: too few for an interval"
        interval = f"{self.mean:+.4f} ± {self.half:.4f} {unit} ({LEVEL:.0%} interval over {self.n} seeds)"
        if not self.clear:
            return f"the difference between {first} and {second} is inside the noise: {interval}"
        return f"{first} is {'better' if self.mean < 0 else 'worse'} than {second}: {interval}"


def paired(first: Mapping[str, float | None], second: Mapping[str, float | None]) -> Paired:
    """Compare two architectures seed by seed (less is better); a seed that failed in either is left out."""
    gaps = [a - b for seed in first if (a := first[seed]) is not None and (b := second.get(seed)) is not None]
    if len(gaps) < 2:
        return Paired(len(gaps), statistics.fmean(gaps) if gaps else math.nan, None)
    return Paired(len(gaps), statistics.fmean(gaps), half_width(gaps))


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the t interval of a mean; of at least two values."""
    from scipy import stats

    error = statistics.stdev(values) / math.sqrt(len(values))
    return float(stats.t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * error


@dataclass(frozen=True)
class Summary:
    """One architecture over its fresh seeds, less is better; the mean is infinite where one of them failed."""

    record: TrialRecord
    n: int
    mean: float
    error: float | None  # standard error of the mean

    @property
    def value(self) -> float | None:
        """Return the mean in the objective's own direction, None where a seed failed."""
        if not math.isfinite(self.mean):
            return None
        return -self.mean if trained_name(self.record) == "accuracy" else self.mean


def turned(record: TrialRecord) -> dict[str, float | None]:
    """Return a record's confirmed results so that less is better."""
    maximize = trained_name(record) == "accuracy"
    return {seed: -v if maximize and v is not None else v for seed, v in record.confirmed.items()}


def trained_name(record: TrialRecord) -> str:
    """Return the first objective that training decides: what is confirmed."""
    return next((name for name in objectives_of(record) if OBJECTIVES[name].kind == TRAINED), "val_loss")


def summaries(records: Iterable[TrialRecord]) -> list[Summary]:
    """Return every confirmed architecture, the best mean first."""
    found = []
    for record in records:
        values = list(turned(record).values())
        if not values:
            continue
        good = [value for value in values if value is not None]
        mean = statistics.fmean(good) if len(good) == len(values) else math.inf
        error = statistics.stdev(good) / math.sqrt(len(good)) if len(good) == len(values) >= 2 else None
        found.append(Summary(record, len(values), mean, error))
    return sorted(found, key=lambda one: (one.mean, one.record.number))


def confirmed_winner(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the best by mean over fresh seeds; None until all that are confirmed have the same seeds, two or more."""
    found = [one for one in summaries(records) if eligible(one.record)]
    seeds = {frozenset(one.record.confirmed) for one in found}
    if len(seeds) != 1 or len(next(iter(seeds))) < ENOUGH or not math.isfinite(found[0].mean):
        return None
    return found[0].record


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
        progress=config.progress,
        keep_checkpoint=False,
    )
    if result.status != "completed" or not result.evals:
        return None
    last = result.evals[-1]
    return last.accuracy if trained_name(record) == "accuracy" else last.valid_loss
