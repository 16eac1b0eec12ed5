"""``data=selective_copying``: copy what matters, ignore the noise between (Mamba, arXiv 2312.00752, table 1, app. E.1).

``n_tokens_to_copy`` tokens lie anywhere among noise (id 0), every set of places equally likely; then follow as many
markers (id V-1), and at the j-th marker the target is the j-th token. Scored: the markers. Tokens are ids 1 to V-2.
The paper's sizes: 16 ids, 4,096 tokens, 16 to copy, fresh examples, batches of 64, a constant learning rate of 1e-4,
400,000 steps, two layers of width 64. ``seq_len`` counts everything, the markers too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig(TaskConfig):
    """Settings of selective copying."""

    kind: str = option("selective_copying", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids, the noise and the marker included [count]", ge=4)
    seq_len: int = option(4096, "length of an example, the markers included [tokens]", ge=3)
    n_tokens_to_copy: int = option(16, "tokens to copy [count]", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 * self.n_tokens_to_copy + 1
        self.require(
            self.seq_len >= least,
            f"n_tokens_to_copy={self.n_tokens_to_copy} need seq_len >= {least} (the tokens, some noise, and a marker "
            f"for each), got {self.seq_len}",
        )


@register_task("selective_copying", config=SelectiveCopyingConfig)
class SelectiveCopying(Task):
    """Selective copying."""

    config: SelectiveCopyingConfig

    def words(self) -> str:
        return f"copy {self.config.n_tokens_to_copy} tokens out of noise"

    def make(self, draws: Draws, train: bool) -> Examples:
        count, length, marker = self.config.n_tokens_to_copy, self.config.seq_len, self.config.vocab_size - 1
        tokens_BK = 1 + draws.below(marker - 1, count)
        places_BK = np.sort(draws.distinct(length - count, count), axis=1)
        inputs_BL = np.zeros((len(draws), length), dtype=np.int64)
        np.put_along_axis(inputs_BL, places_BK, tokens_BK, axis=1)
        inputs_BL[:, -count:] = marker
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -count:] = tokens_BK
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -count:] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
