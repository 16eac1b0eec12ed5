"""``data=memorisation``: a fixed dictionary, in no example, that the weights have to store (MAD, arXiv 2403.17844).

A key (an id below half of the plain ids) is followed by id V-1, where the target is the key's value. Which value a key
has is drawn once, from ``task_seed``, and is the same in every example of training and test: that both share it is the
task; the sequences of keys are others. Scored: the places of id V-1. The paper's sizes: 256 ids, 32 tokens, 256
examples to train on; one at a time vocab_size 512, 1024, 2048, 4096, 8192. With 256 examples of 16 keys some of 4,095
keys never come up in training (about one in e), so a full score needs fewer keys or more examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws, keys_of
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class MemorisationConfig(TaskConfig):
    """Settings of memorisation."""

    kind: str = option("memorisation", "kind of data, a name in SOURCES")
    vocab_size: int = option(256, "different ids: keys, values, noise, one to ask [count]", ge=3)
    seq_len: int = option(32, "length of an example [tokens]", ge=2)
    noise_vocab_size: int = option(0, "ids of noise [count]", ge=0)
    frac_noise: float = option(0.0, "share of the questions that are two noise ids instead [0 to 1]", ge=0, le=1)
    n_train_examples: int | None = option(256, "examples of the training set; none: fresh ones", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.seq_len % 2 == 0, f"seq_len={self.seq_len} must be even: a key and a place for its value")
        self.require(
            self.frac_noise == 0 or self.noise_vocab_size > 0,
            f"frac_noise={self.frac_noise} needs noise ids: noise_vocab_size >= 1",
        )
        self.require(
            self.plain_ids >= 4,
            f"vocab_size={self.vocab_size} must be at least {self.noise_vocab_size + 5}: two keys, two values, one id "
            f"to ask and {self.noise_vocab_size} of noise",
        )

    @property
    def plain_ids(self) -> int:
        """Ids of keys and values together [count]."""
        return self.vocab_size - 1 - self.noise_vocab_size


@register_task("memorisation", config=MemorisationConfig)
class Memorisation(Task):
    """A fixed dictionary that the weights have to store."""

    config: MemorisationConfig

    def __init__(self, config: MemorisationConfig) -> None:
        super().__init__(config)
        self._keys = config.plain_ids // 2
        about = (config.kind, "dictionary", config.task_seed)
        values = Draws(keys_of(np.zeros(1, dtype=np.int64), *about)).distinct(config.plain_ids - self._keys, self._keys)
        self._values_K = self._keys + values[0]

    def words(self) -> str:
        return f"{self._keys:,} keys with fixed values that the weights have to store"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        pairs = config.seq_len // 2
        keys_BP = draws.below(self._keys, pairs)
        asked_BP = ~draws.chance(config.frac_noise, pairs)
        np.put_along_axis(asked_BP, draws.below(pairs, 1), True, axis=1)  # one at least
        inputs_BL = np.empty((len(draws), config.seq_len), dtype=np.int64)
        inputs_BL[:, 0::2], inputs_BL[:, 1::2] = keys_BP, config.vocab_size - 1
        if config.frac_noise:
            noise_BL = config.plain_ids + draws.below(config.noise_vocab_size, config.seq_len)
            inputs_BL = np.where(np.repeat(asked_BP, 2, axis=1), inputs_BL, noise_BL)
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, 1::2] = self._values_K[keys_BP]
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, 1::2] = asked_BP
        return Examples(inputs_BL, targets_BL, mask_BL)
