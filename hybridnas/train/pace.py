"""How fast an architecture trains on this machine, by a few steps of training."""

from __future__ import annotations

import time

from hybridnas.arch.arch import Arch
from hybridnas.data.source import Source
from hybridnas.train.callbacks import Callback, Run
from hybridnas.train.config import TrainConfig
from hybridnas.train.loop import run

FORWARD = 1 / 3  # of a step's time is its forward pass, which is all that a measurement takes


class _Clock(Callback):
    """Notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, run: Run, step: int) -> None:
        self.ends.append(time.perf_counter())


def seconds_per_token(arch: Arch, source: Source, config: TrainConfig, device: str, *, steps: int = 3) -> float:
    """Return the time that a training of these settings takes per token [s]; the first of ``steps`` is not timed."""
    clock, tokens = _Clock(), steps * config.step_tokens
    few = config.replace(tokens=tokens, schedule="constant", anneal_at=(), eval_at=(), valid_tokens=1)
    run(arch, source, few, device=device, callbacks=[clock])
    return (clock.ends[-1] - clock.ends[0]) / ((steps - 1) * config.step_tokens)
