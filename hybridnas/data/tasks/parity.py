"""``data=parity``: is the number of ones so far odd? The smallest state that a model can be asked to track.

Random ids; the target at each place is the sum of all ids so far, modulo ``vocab_size``: parity with two ids, counting
modulo n with n. Scored: every place (``score=all``), or the last one alone. A recurrence whose transitions are positive
and diagonal, as in Mamba, cannot do it at every length, nor can attention of fixed depth (Merrill and others, arXiv
2404.08819; Grazzi and others, arXiv 2411.12537).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class ParityConfig(TaskConfig):
    """Settings of parity."""

    kind: str = option("parity", "kind of data, a name in SOURCES")
    vocab_size: int = option(2, "different ids, and the modulus of the sum [count]", ge=2)
    seq_len: int = option(64, "length of an example [tokens]", ge=2)
    score: str = option("all", "which places count", choices=("all", "last"))


@register_task("parity", config=ParityConfig)
class Parity(Task):
    """The sum so far, modulo the number of ids."""

    config: ParityConfig

    def words(self) -> str:
        what = "parity" if self.vocab_size == 2 else f"sum modulo {self.vocab_size}"
        return f"{what} of all ids so far"

    def make(self, draws: Draws, train: bool) -> Examples:
        inputs_BL = draws.below(self.config.vocab_size, self.config.seq_len)
        targets_BL = np.cumsum(inputs_BL, axis=1) % self.config.vocab_size
        mask_BL = np.full(inputs_BL.shape, self.config.score == "all")
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
