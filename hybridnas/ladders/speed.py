"""How long a ladder will take: seconds per step of each architecture and size, measured by a few steps of training."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hybridnas.ladders.plan import LadderRun, Plan
from hybridnas.train.callbacks import Callback, Run
from hybridnas.train.loop import run as train

_STEPS = 4  # the first is not timed
_FORWARD = 1 / 3  # of a step's time is its forward pass, which is all that a measurement takes


class _Clock(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, run: Run, step: int) -> None:
        self.ends.append(time.perf_counter())


def expected_seconds(plan: Plan, runs: Sequence[LadderRun]) -> float:
    """Return the time that these runs take one after another on this machine, measurements included [s]."""
    speeds: dict[tuple[str, float], float] = {}
    total = 0.0
    for run in runs:
        key, config = (run.entrant, run.factor), run.config
        if key not in speeds:
            clock = _Clock()
            tokens = _STEPS * config.step_tokens
            few = config.replace(tokens=tokens, schedule="constant", anneal_at=(), eval_at=(), valid_tokens=1)
            train(run.arch, plan.source, few, device=plan.config.device, callbacks=[clock])
            speeds[key] = (clock.ends[-1] - clock.ends[0]) / ((_STEPS - 1) * config.step_tokens)
        measured = len(config.decays()) * config.valid_tokens
        total += speeds[key] * (run.trained_tokens + _FORWARD * measured)
    return total
