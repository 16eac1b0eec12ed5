"""How long a suite will take: the time of a training step of each architecture and length, by a few steps of training.

After ``_LONGEST`` seconds of measuring, the steps of the others follow from their FLOPs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridnas.suites.runner import Runner

_LONGEST = 10.0  # of all measurements together [s]


def expected_seconds(runner: Runner) -> float:
    """Return the time that a suite's missing trainings take on this machine, evaluations included [s].

    Of architectures alone: a suite that trains modules of the user's own has no count of FLOPs. A training that
    reaches the suite's ``stop_at`` ends sooner.
    """
    from hybridnas.arch.arch import Arch  # which loads torch, and help texts need this package
    from hybridnas.train.pace import FORWARD, seconds_per_token

    known: dict[tuple[str, int, int], float] = {}  # seconds per token
    per_flop = total = 0.0
    began = time.perf_counter()
    for one, missing in runner.planned():
        config, arch = one.config, one.model
        assert isinstance(arch, Arch)
        flops = arch.cost(config.seq_len).flops_per_token
        key = (one.fingerprint, config.seq_len, config.batch_size)
        if key not in known:
            if not per_flop or time.perf_counter() - began < _LONGEST:
                known[key] = seconds_per_token(arch, runner.source(one.task), config, runner.device)
                per_flop = known[key] / flops
            else:
                known[key] = per_flop * flops
        measured = len(config.eval_at) * config.valid_tokens
        total += missing * known[key] * (config.steps * config.step_tokens + FORWARD * measured)
    return total
