"""``data=distractor_recall``: associative recall at length, among distractor pairs that are never asked for.

``n_pairs`` key-value pairs that will be asked for and ``n_distractors`` that will not lie anywhere in the first part of
an example (``frac_context``), which no key tells apart; between and after them stand noise ids. At the end every key of
the first kind is asked for, in random order: k v k v ... Scored: the queries' values, predicted at their keys. All
``seq_len`` tokens count, so that a longer example is the same task over a longer gap. Keys are ids below n/2, values
in [n/2, n), noise above, n the vocabulary without noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, next_tokens, register_task


@dataclass(frozen=True, kw_only=True)
class DistractorRecallConfig(TaskConfig):
    """Settings of recall among distractors."""

    kind: str = option("distractor_recall", "kind of data, a name in SOURCES")
    vocab_size: int = option(96, "different ids: keys, values, noise [count]", ge=3)
    seq_len: int = option(512, "length of an example [tokens]", ge=4)
    noise_vocab_size: int = option(32, "ids of noise, the highest of the vocabulary [count]", ge=1)
    n_pairs: int = option(8, "key-value pairs that are asked for [count]", ge=1)
    n_distractors: int = option(8, "key-value pairs that are not [count]", ge=0)
    frac_context: float = option(0.25, "part of an example in whose beginning the pairs lie [0 to 1]", gt=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        shown = self.n_pairs + self.n_distractors
        self.require(self.seq_len % 2 == 0, f"seq_len={self.seq_len} must be even: keys and values come in twos")
        self.require(
            self.slots >= shown,
            f"n_pairs={self.n_pairs} and n_distractors={self.n_distractors} do not fit into the first "
            f"frac_context={self.frac_context} of seq_len={self.seq_len} tokens, which hold {self.slots} pairs; "
            f"raise seq_len or frac_context",
        )
        self.require(
            self.plain_ids // 2 >= max(2, shown),
            f"has {shown} pairs, which need as many different keys: "
            f"vocab_size >= {2 * max(2, shown) + self.noise_vocab_size}, got {self.vocab_size}",
        )

    @property
    def plain_ids(self) -> int:
        """Ids of keys and values together [count]."""
        return self.vocab_size - self.noise_vocab_size

    @property
    def slots(self) -> int:
        """Places for a pair in the first part [count]."""
        return min(round(self.frac_context * self.seq_len) // 2, self.seq_len // 2 - self.n_pairs)


@register_task("distractor_recall", config=DistractorRecallConfig)
class DistractorRecall(Task):
    """Recall among distractors."""

    config: DistractorRecallConfig

    def words(self) -> str:
        return f"{self.config.n_pairs} of {self.config.n_pairs + self.config.n_distractors} pairs asked for at the end"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        shown, keys, length = config.n_pairs + config.n_distractors, config.plain_ids // 2, config.seq_len
        keys_BK = draws.distinct(keys, shown)
        values_BK = keys + draws.below(config.plain_ids - keys, shown)
        slots_BK = 2 * draws.distinct(config.slots, shown)
        whole_BN = config.plain_ids + draws.below(config.noise_vocab_size, length)
        np.put_along_axis(whole_BN, slots_BK, keys_BK, axis=1)
        np.put_along_axis(whole_BN, slots_BK + 1, values_BK, axis=1)
        first = length - 2 * config.n_pairs  # the order of the keys is random already, so the first ones are asked for
        whole_BN[:, first::2] = keys_BK[:, : config.n_pairs]
        whole_BN[:, first + 1 :: 2] = values_BK[:, : config.n_pairs]
        scored_BN = np.zeros(whole_BN.shape, dtype=bool)
        scored_BN[:, first + 1 :: 2] = True
        return next_tokens(whole_BN, scored_BN, length, everywhere=False)
