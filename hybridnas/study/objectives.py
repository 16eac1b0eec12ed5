"""What a search looks for: objectives by name with their directions, and limits that a candidate must keep.

An objective's value stands in a record in its own direction (``TrialRecord.objectives``); wherever two are compared,
it is turned so that less is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybridnas.errors import ConfigError, suggest
from hybridnas.study.records import COMPLETE, TrialRecord

TRAINED, COUNTED, MEASURED = "trained", "counted", "measured"  # where a value comes from


@dataclass(frozen=True)
class Objective:
    """One objective: where its value comes from, its label, and whether more is better."""

    name: str
    kind: str  # TRAINED | COUNTED | MEASURED
    label: str  # of an axis or a column, with its unit
    maximize: bool = False

    def turned(self, value: float) -> float:
        """Return the value so that less is better."""
        return -value if self.maximize else value


OBJECTIVES = {
    one.name: one
    for one in (
        Objective("val_loss", TRAINED, "validation loss [nats/token]"),
        Objective("accuracy", TRAINED, "accuracy [1]", maximize=True),
        Objective("params", COUNTED, "parameters"),
        Objective("active_params", COUNTED, "active parameters"),
        Objective("flops_per_token", COUNTED, "FLOPs per token"),
        Objective("state_bytes", COUNTED, "state of one sequence"),
        Objective("tokens_per_second", MEASURED, "tokens read per second", maximize=True),  # former name of prefill_...
        Objective("ms_per_token", MEASURED, "time to generate a token [ms]"),
        Objective("train_tokens_per_second", MEASURED, "tokens trained per second", maximize=True),
        Objective("prefill_tokens_per_second", MEASURED, "tokens of prompts read per second", maximize=True),
        Objective("decode_tokens_per_second", MEASURED, "tokens generated per second", maximize=True),
    )
}
LIMITS = {  # of what: the most of what should be small, the least of what should be large
    "max_params": "params",
    "max_active_params": "active_params",
    "max_state_bytes": "state_bytes",
    "max_flops": "flops_per_token",
    "max_latency_ms": "ms_per_token",
    "min_train_tokens_per_second": "train_tokens_per_second",
    "min_prefill_tokens_per_second": "prefill_tokens_per_second",
    "min_decode_tokens_per_second": "decode_tokens_per_second",
}
OF_LENGTH = (  # limits that mean nothing without the context at which they hold
    *("max_state_bytes", "max_latency_ms", "min_prefill_tokens_per_second", "min_decode_tokens_per_second"),
)
FIRST_LIMITS = ("max_params", "max_active_params", "max_state_bytes", "max_latency_ms")  # those of version 0.2
DEFAULT = ("val_loss",)


def read_objectives(names: Sequence[str]) -> tuple[Objective, ...]:
    """Return the objectives of these names; raises ConfigError for unknown ones, twins, and no trained one."""
    known = tuple(OBJECTIVES)
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(
                f"search objectives has no {name!r}{suggest(str(name), OBJECTIVES)}; allowed: {', '.join(OBJECTIVES)}",
                field="objectives",
                got=name,
                allowed=known,
            )
        if list(names).count(name) > 1:
            raise ConfigError(
                f"search objectives names {name!r} twice; name each once", field="objectives", got=name, allowed=known
            )
    found = tuple(OBJECTIVES[name] for name in names)
    if not any(one.kind == TRAINED for one in found):
        raise ConfigError(
            f"search objectives={list(names)} needs val_loss or accuracy: "
            f"without one nothing is learned from training, and the smallest model wins",
            field="objectives",
            got=tuple(names),
            allowed=("val_loss", "accuracy"),
        )
    return found


def directions(names: Sequence[str]) -> list[Literal["maximize", "minimize"]]:
    """Return Optuna's directions of these objectives."""
    return ["maximize" if OBJECTIVES[name].maximize else "minimize" for name in names]


def counted(cost: Mapping[str, float], state_bytes: float) -> dict[str, float]:
    """Return the values that are known before training: a cost's counts, and the state at the length asked for."""
    known = {name: float(cost[name]) for name, one in OBJECTIVES.items() if one.kind == COUNTED and name in cost}
    return {**known, "state_bytes": float(state_bytes)}


def wants_hardware(names: Iterable[str], limits: Mapping[str, float]) -> bool:
    """Whether candidates must be measured on this machine, for these objectives and limits."""
    return any(OBJECTIVES[name].kind == MEASURED for name in (*names, *(LIMITS[limit] for limit in limits)))


def counted_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Return the limits that follow from the architecture."""
    return {name: limit for name, limit in limits.items() if OBJECTIVES[LIMITS[name]].kind == COUNTED}


def excess(limits: Mapping[str, float], values: Mapping[str, float]) -> dict[str, float]:
    """Return by how much each limit is passed, in its own unit; zero and less keeps it."""
    return {name: OBJECTIVES[LIMITS[name]].turned(values[LIMITS[name]] - limit) for name, limit in limits.items()}


def broken(limits: Mapping[str, float], values: Mapping[str, float]) -> list[str]:
    """Return the names of the limits that are passed."""
    return [name for name, amount in excess(limits, values).items() if amount > 0]


def violation(limits: Mapping[str, float], values: Mapping[str, float]) -> str | None:
    """Return which limits are passed, as a sentence, or None."""
    found = [
        f"{LIMITS[name]}={values[LIMITS[name]]:,.6g} is {'below' if OBJECTIVES[LIMITS[name]].maximize else 'above'} "
        f"{name}={limits[name]:,.6g}"
        for name in broken(limits, values)
    ]
    return " and ".join(found) or None


def within_spread(
    limits: Mapping[str, float], values: Mapping[str, float], spread: Mapping[str, Sequence[float]]
) -> list[str]:
    """Return the limits that a measured value passes while its interval does not: such a limit counts as met."""
    found = []
    for name in broken(limits, values):
        measured = LIMITS[name]
        if measured in spread:
            low, high = spread[measured]
            best = high if OBJECTIVES[measured].maximize else low
            found += [name] if not broken({name: limits[name]}, {measured: best}) else []
    return found


def of_eval(names: Sequence[str], known: Mapping[str, float], entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the objectives at one evaluation (a curve's entry); ``known``: those that training does not change."""
    trained = {"val_loss": entry.get("valid_loss"), "accuracy": entry.get("accuracy")}
    found = {name: trained[name] if name in trained else known.get(name) for name in names}
    return {name: float(value) for name, value in found.items() if value is not None}


def known_of(record: TrialRecord) -> dict[str, float]:
    """Return the objectives of a record that training does not change."""
    return {name: value for name, value in record.objectives.items() if OBJECTIVES[name].kind != TRAINED}


def objectives_of(record: TrialRecord) -> dict[str, float]:
    """Return a record's objectives; those of records from before there was a choice are their loss."""
    if record.objectives:
        return dict(record.objectives)
    return {} if record.valid_loss is None else {"val_loss": record.valid_loss}


def score(record: TrialRecord) -> float | None:
    """Return the first objective so that less is better: what orders a leaderboard; None where nothing was measured."""
    for name, value in objectives_of(record).items():
        return OBJECTIVES[name].turned(value) if name in OBJECTIVES and math.isfinite(value) else None
    return None


def point(values: Mapping[str, float]) -> tuple[float, ...]:
    """Return objectives as a point in which less is better."""
    return tuple(OBJECTIVES[name].turned(value) for name, value in values.items())


def eligible(record: TrialRecord) -> bool:
    """Whether a record may win: trained to the end, scored, and within the limits."""
    return record.state == COMPLETE and score(record) is not None and record.violation is None
