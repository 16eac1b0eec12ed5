"""How long a ladder will take: seconds per step of each architecture and size, measured by a few steps of training."""

from __future__ import annotations

from collections.abc import Sequence

from hybridnas.ladders.plan import LadderRun, Plan
from hybridnas.train.pace import FORWARD, seconds_per_token

_STEPS = 4  # the first is not timed


def expected_seconds(plan: Plan, runs: Sequence[LadderRun]) -> float:
    """Return the time that these runs take one after another on this machine, measurements included [s]."""
    speeds: dict[tuple[str, float], float] = {}
    total = 0.0
    for run in runs:
        key, config = (run.entrant, run.factor), run.config
        if key not in speeds:
            speeds[key] = seconds_per_token(run.arch, plan.source, config, plan.config.device, steps=_STEPS)
        measured = len(config.decays()) * config.valid_tokens
        total += speeds[key] * (run.trained_tokens + FORWARD * measured)
    return total
