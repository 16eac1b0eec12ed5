"""``data=mqar``: multi-query associative recall (Zoology, arXiv 2312.04927; Based, arXiv 2402.18668).

``n_pairs`` keys, each with a value, stand at the start: k v k v ... Every key is asked for once more, at an even
distance from the start's end that is drawn from a power law, and its value is the target there. Scored: the queries.
Keys are ids in [1, V/2), values in [V/2, V), no key and no value twice in an example.

The papers' sizes: Zoology's figure 2 has V=8192 and (seq_len, n_pairs) = (64, 4), (128, 8), (256, 16), (512, 64) with
100,000 examples to train on and 3,000 to test on; Based mixes 100,000 at (64, 4) with 20,000 each at (128, 8) and
(256, 16/32/64), and tests 1,000 each at (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256).
The filler is random as in the reference: it can hold keys and values that mean nothing; ``filler=zero`` has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class MqarConfig(TaskConfig):
    """Settings of multi-query associative recall."""

    kind: str = option("mqar", "kind of data, a name in SOURCES")
    vocab_size: int = option(8192, "different ids: keys below the half, values above, 0 the filler [count]", ge=4)
    seq_len: int = option(128, "length of an example [tokens]", ge=4)
    n_pairs: int = option(8, "key-value pairs, each asked for once [count]", ge=1)
    power_a: float = option(0.01, "distances g are drawn with weight g^(a - 1); 1: evenly [1]", gt=0)
    filler: str = option("random", "ids between queries: random ones, or zeros", choices=("random", "zero"))
    n_train_examples: int | None = option(100_000, "examples of the training set; none: fresh ones", ge=1)
    n_test_examples: int = option(3000, "examples held out for validation [count]", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        length, pairs, vocab = self.seq_len, self.n_pairs, self.vocab_size
        self.require(length % 2 == 0, f"seq_len={length} must be even: keys and values come in twos")
        self.require(vocab % 2 == 0, f"vocab_size={vocab} must be even: half of it are keys, half values")
        self.require(
            4 * pairs <= length,
            f"n_pairs={pairs} need seq_len >= {4 * pairs} (two tokens a pair, and two a query), got {length}",
        )
        self.require(
            pairs < vocab // 2,
            f"n_pairs={pairs} need as many different keys: vocab_size >= {2 * pairs + 2}, got {vocab}",
        )


@register_task("mqar", config=MqarConfig)
class Mqar(Task):
    """Multi-query associative recall."""

    config: MqarConfig

    def __init__(self, config: MqarConfig) -> None:
        super().__init__(config)
        slots = (config.seq_len - 2 * config.n_pairs) // 2
        self._weights = np.arange(1, slots + 1, dtype=np.float64) ** (config.power_a - 1)

    def words(self) -> str:
        return f"{self.config.n_pairs} key-value pairs, each asked for once"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        half, pairs, start = config.vocab_size // 2, config.n_pairs, 2 * config.n_pairs
        keys_BK = 1 + draws.distinct(half - 1, pairs)
        values_BK = half + draws.distinct(half, pairs)
        places_BK = start + 2 * draws.weighted(self._weights, pairs)
        if config.filler == "random":
            inputs_BL = draws.below(config.vocab_size, config.seq_len)
        else:
            inputs_BL = np.zeros((len(draws), config.seq_len), dtype=np.int64)
        inputs_BL[:, 0:start:2] = keys_BK
        inputs_BL[:, 1:start:2] = values_BK
        np.put_along_axis(inputs_BL, places_BK, keys_BK, axis=1)
        targets_BL = np.zeros_like(inputs_BL)
        np.put_along_axis(targets_BL, places_BK, values_BK, axis=1)
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        np.put_along_axis(mask_BL, places_BK, True, axis=1)
        return Examples(inputs_BL, targets_BL, mask_BL)
