"""The order of a study's trials: the leaderboard's rows, the winner, the front, and scores at rungs.

Completed trials are ranked by the first objective, those that were confirmed by their fresh seeds; stopped ones follow
with the loss of their last rung, which is not comparable with a full trial's; then what failed or was rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hybridnas.analysis import pareto
from hybridnas.analysis.confirmation import confirmed_winner, summaries
from hybridnas.analysis.held_out import VALID, loss_on, stated_part
from hybridnas.study.objectives import DEFAULT, eligible, objectives_of, of_eval, point, score
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, RUNNING, TrialRecord

_ORDER = {COMPLETE: 0, PRUNED: 1, FAIL: 2, INFEASIBLE: 3, DUPLICATE: 4, RUNNING: 5}


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard."""

    record: TrialRecord
    rank: int | None  # completed trials only, from 1
    loss: float | None  # of a stopped trial: at its last rung [nats per token]
    gap: float | None  # the loss on ``part`` minus the reference preset's, completed trials only; negative: better
    tokens_per_active: float | None  # training tokens over active parameters
    front: bool = False  # no other completed trial beats it in all objectives
    part: str = VALID  # of the data, on which ``gap`` is stated; the order is always that of validation

    @property
    def is_preset(self) -> bool:
        """Whether the trial is a preset."""
        return self.record.preset is not None

    @property
    def architecture(self) -> str:
        """Return the preset's name and pattern, or the pattern."""
        preset = self.record.preset
        return f"{preset} {self.record.pattern}" if preset else self.record.pattern


def rows(records: Iterable[TrialRecord], reference: str | None = None) -> list[Row]:
    """Return the leaderboard's rows: completed by score, stopped by tokens then loss, then failed, then the others.

    Where fresh seeds decide who wins, those that were confirmed come first, by their means, the winner before all.
    ``reference`` names the preset that losses are compared with.
    """
    known = list(records)
    best = confirmed_winner(known)
    confirmed = [] if best is None else [best, *(one.record for one in summaries(known) if one.record is not best)]
    place = {record.number: index for index, record in enumerate(confirmed)}
    part = stated_part(known)
    mark = preset_loss(known, reference, part)
    on_front = {record.number for record in front(known)}
    ranked = 0
    found = []
    for record in sorted(known, key=lambda one: (place.get(one.number, len(place)), _key(one))):
        loss = last_loss(record)
        rank = None
        if record.state == COMPLETE and loss is not None:
            ranked += 1
            rank = ranked
        stated = loss_on(record, part)
        gap = stated - mark if rank and stated is not None and mark is not None else None
        active = record.cost.get("active_params")
        ratio = record.tokens / active if active and record.tokens else None
        found.append(Row(record, rank, loss, gap, ratio, record.number in on_front, part))
    return found


def winner(records: Iterable[TrialRecord]) -> TrialRecord | None:
    """Return the completed trial that is best in the first objective, the earlier of two equals; None before the first.

    Once the best were trained again with fresh seeds, their mean over these decides, and only they can win. A preset
    that exceeds one of the limits cannot.
    """
    known = list(records)
    confirmed = confirmed_winner(known)
    if confirmed is not None:
        return confirmed
    return min(filter(eligible, known), key=lambda record: (score(record), record.number), default=None)


def preset_record(records: Iterable[TrialRecord], preset: str | None) -> TrialRecord | None:
    """Return the completed trial of a preset, through the original where the preset's trial repeats another."""
    by_number = {record.number: record for record in records}
    for record in by_number.values():
        if preset is not None and record.preset == preset:
            if record.state == DUPLICATE and record.duplicate_of is not None:
                record = by_number.get(record.duplicate_of, record)
            if record.state == COMPLETE:
                return record
    return None


def preset_loss(records: Iterable[TrialRecord], preset: str | None, part: str = VALID) -> float | None:
    """Return the final loss of a preset's trial on a part [nats per token], None where it did not complete."""
    record = preset_record(records, preset)
    return loss_on(record, part) if record else None


def last_loss(record: TrialRecord) -> float | None:
    """Return the final loss, or for a stopped trial the last one that it recorded [nats per token]."""
    if record.valid_loss is not None:
        return record.valid_loss
    points = record.points()
    return points[-1][1] if points else None


def trained_drawn(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the candidates that the search drew and trained, each architecture once."""
    return [one for one in records if one.preset is None and one.tokens > 0 and one.duplicate_of is None]


def front(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the completed trials that no other beats in all objectives, by the first of them."""
    done = {record.number: record for record in records if eligible(record)}
    points = {number: point(objectives_of(record)) for number, record in done.items()}
    width = max((len(one) for one in points.values()), default=0)
    points = {number: one for number, one in points.items() if len(one) == width}
    best = pareto.fronts(points)[0] if points else []
    return [done[number] for number in sorted(best, key=lambda number: (points[number], number))]


def rung_scores(
    records: Iterable[TrialRecord], rungs: Sequence[int], more: Mapping[int, Mapping[int, Mapping[str, float]]]
) -> dict[int, dict[int, float]]:
    """Return rung -> candidate -> score for successive halving: the objective, or the rank among several.

    ``more`` adds objectives that are in no record yet: rung -> candidate -> name -> value.
    """
    points: dict[int, dict[int, tuple[float, ...]]] = {rung: {} for rung in rungs}
    for record in records:
        if record.state not in (COMPLETE, PRUNED):
            continue
        names = list(record.objectives) or list(DEFAULT)
        for entry in record.curve or [{"tokens": t, "valid_loss": loss} for t, loss in record.rungs]:
            values = of_eval(names, record.objectives, entry)
            if entry.get("tokens") in points and len(values) == len(names):
                points[entry["tokens"]][record.number] = point(values)
    for rung, found in more.items():
        points[rung] |= {number: point(values) for number, values in found.items()}
    return {rung: _as_scores(found) for rung, found in points.items()}


def _as_scores(points: Mapping[int, tuple[float, ...]]) -> dict[int, float]:
    if all(len(one) == 1 for one in points.values()):
        return {number: one[0] for number, one in points.items()}
    return pareto.scores(dict(sorted(points.items())))


def _key(record: TrialRecord) -> tuple[int, float, float, int]:
    value = score(record) if record.objectives else last_loss(record)
    known = float("inf") if value is None else value
    order = _ORDER[record.state] if record.state != COMPLETE or value is not None else _ORDER[FAIL]
    return (order, -record.tokens if record.state == PRUNED else 0, known, record.number)
