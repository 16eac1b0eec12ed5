"""``data=needle``: a number hidden in a long text, asked for at its end (needle in a haystack; RULER, 2404.06654).

With one needle it is pass key retrieval (arXiv 2305.16300). Ids: 0 to 9 digits, 10 "here is", 11 "what is", then 16
names, then the haystack's ids. Each needle is "here is", a name and ``n_digits`` digits, at a random place of random
haystack ids; at the end "what is" and the name of one needle, whose digits follow. Scored: the digits after the
question, each predicted after those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, next_tokens, register_task

DIGITS, HERE, ASK = 10, 10, 11
FIRST_NAME, NAMES = 12, 16
FIRST_HAY = FIRST_NAME + NAMES


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Settings of needles in a haystack."""

    kind: str = option("needle", "kind of data, a name in SOURCES")
    vocab_size: int = option(
        64, "different ids: digits, two markers, 16 names, the haystack's [count]", ge=FIRST_HAY + 1
    )
    seq_len: int = option(256, "length of an example, question and answer included [tokens]", ge=6)
    n_needles: int = option(1, "needles in the haystack, of which one is asked for [count]", ge=1, le=NAMES)
    n_digits: int = option(5, "digits of a needle [count]", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.n_needles * (self.n_digits + 2) + self.n_digits + 2
        self.require(
            self.seq_len >= least,
            f"n_needles={self.n_needles} of n_digits={self.n_digits} need seq_len >= {least}, got {self.seq_len}",
        )


@register_task("needle", config=NeedleConfig)
class Needle(Task):
    """One of several hidden numbers."""

    config: NeedleConfig

    def words(self) -> str:
        return f"one of {self.config.n_needles} numbers of {self.config.n_digits} digits hidden in random ids"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        count, width = config.n_needles, config.n_digits + 2
        whole_BN = FIRST_HAY + draws.below(config.vocab_size - FIRST_HAY, config.seq_len + 1)
        end = config.seq_len + 1 - width  # where the question begins
        # As many tokens stand between needles as the haystack has beside them, shared out by sorted draws.
        gaps_BK = np.sort(draws.below(end - count * width + 1, count), axis=1)
        starts_BK = gaps_BK + np.arange(count) * width
        names_BK = FIRST_NAME + draws.distinct(NAMES, count)
        digits_BKD = draws.below(DIGITS, count * config.n_digits).reshape(-1, count, config.n_digits)
        needles_BKW = np.concatenate((np.full_like(names_BK, HERE)[..., None], names_BK[..., None], digits_BKD), axis=2)
        places_BKW = starts_BK[..., None] + np.arange(width)
        np.put_along_axis(whole_BN, places_BKW.reshape(len(draws), -1), needles_BKW.reshape(len(draws), -1), axis=1)
        asked_B = draws.below(count, 1)[:, 0]
        whole_BN[:, end:] = needles_BKW[np.arange(len(draws)), asked_B]
        whole_BN[:, end] = ASK
        scored_BN = np.zeros(whole_BN.shape, dtype=bool)
        scored_BN[:, end + 2 :] = True
        return next_tokens(whole_BN, scored_BN, config.seq_len, everywhere=False)
