"""``data=s5``: the product of all permutations so far (Merrill and others, "The Illusion of State", arXiv 2404.08819).

Ids are the permutations of ``degree`` things in lexicographic order; the target at each place is the id of their
product so far, the newest applied last. Scored: every place (``score=all``), or the last one alone. With five things
(120 ids) the word problem is NC1-complete, which linear recurrences with diagonal transitions and attention of fixed
depth cannot solve at every length. ``generators=swaps`` draws only exchanges of two things and the identity.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class S5Config(TaskConfig):
    """Settings of permutation composition."""

    kind: str = option("s5", "kind of data, a name in SOURCES")
    vocab_size: int = option(120, "different ids: the factorial of degree [count]", ge=2)
    seq_len: int = option(32, "length of an example [tokens]", ge=2)
    degree: int = option(5, "things that are permuted [count]", ge=2, le=6)
    generators: str = option("all", "permutations that are drawn: all, or exchanges of two", choices=("all", "swaps"))
    score: str = option("all", "which places count", choices=("all", "last"))

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = math.factorial(self.degree)
        self.require(
            self.vocab_size == needed, f"degree={self.degree} has vocab_size={needed} ids, got {self.vocab_size}"
        )


@register_task("s5", config=S5Config)
class S5(Task):
    """The product of all permutations so far."""

    config: S5Config

    def __init__(self, config: S5Config) -> None:
        super().__init__(config)
        every_PD = np.array(list(itertools.permutations(range(config.degree))), dtype=np.int64)
        place_D = config.degree ** np.arange(config.degree)
        number = np.zeros(config.degree**config.degree, dtype=np.int64)
        number[every_PD @ place_D] = np.arange(len(every_PD))
        # after[a, b]: first b, then a
        self._after_PP = number[every_PD[:, every_PD] @ place_D].reshape(-1)
        moved_P = (every_PD != np.arange(config.degree)).sum(axis=1)
        self._drawn = np.flatnonzero(moved_P <= (2 if config.generators == "swaps" else config.degree))

    def words(self) -> str:
        return f"the product of all permutations of {self.config.degree} so far"

    def make(self, draws: Draws, train: bool) -> Examples:
        length, size = self.config.seq_len, self.config.vocab_size
        inputs_BL = self._drawn[draws.below(len(self._drawn), length)]
        targets_BL = inputs_BL.copy()
        reach = 1
        while reach < length:  # products of the last 1, 2, 4, ... permutations
            targets_BL[:, reach:] = self._after_PP[targets_BL[:, reach:] * size + targets_BL[:, :-reach]]
            reach *= 2
        mask_BL = np.full(inputs_BL.shape, self.config.score == "all")
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
