"""``data=compression``: everything that was read has to come back out of one position (MAD, arXiv 2403.17844).

Random ids (0 to V-2), then one marker (id V-1). The prediction for place i is made from what the model holds at the
marker alone, and from i: the task's head (``heads``) is the decoder of the paper, two layers of width d_model that
read the last position's vector plus sines and cosines of i (hybridnas.data.heads). It is trained with the model and
belongs to the run: it is in its checkpoints, but no part of the architecture, its parameter count or its export.
Scored: every place but the marker's. The paper's sizes: 16 ids, 32 tokens, 12,800 examples to train on; one at a time
vocab_size 32, 64, 128, seq_len 64, 128, 256, n_train_examples 6400, 3200, 1600, 800.

Where this differs from mad-lab's code, a setting brings it back: ``score_marker=true`` scores the marker's place too,
whose target is always the marker, and ``score_noise=true`` the places of noise ids, which the code's own comment means
to leave out. The rest is as there, but that the model's head has no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class CompressionConfig(TaskConfig):
    """Settings of compression."""

    kind: str = option("compression", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids: what is read, noise, the marker [count]", ge=3)
    seq_len: int = option(32, "length of an example, the marker included [tokens]", ge=2)
    noise_vocab_size: int = option(0, "ids of noise [count]", ge=0)
    frac_noise: float = option(0.0, "share of the ids that are noise instead [0 to 1]", ge=0, le=1)
    score_noise: bool = option(False, "noise has to come back as well, as in mad-lab [yes/no]")
    score_marker: bool = option(False, "the marker has to come back as well, as in mad-lab [yes/no]")
    n_train_examples: int | None = option(12_800, "examples of the training set; none: fresh ones", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.frac_noise == 0 or self.noise_vocab_size > 0,
            f"frac_noise={self.frac_noise} needs noise ids: noise_vocab_size >= 1",
        )
        self.require(
            self.plain_ids >= 2,
            f"vocab_size={self.vocab_size} must be at least {self.noise_vocab_size + 3}: two ids to read, the marker "
            f"and {self.noise_vocab_size} of noise",
        )

    @property
    def plain_ids(self) -> int:
        """Ids to be compressed [count]."""
        return self.vocab_size - 1 - self.noise_vocab_size


@register_task("compression", config=CompressionConfig)
class Compression(Task):
    """Everything that was read, out of one position."""

    config: CompressionConfig

    head = "readout"

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        from hybridnas.data.heads.readout import Readout

        return {self.head: Readout(d_model)}

    def words(self) -> str:
        return f"{self.config.seq_len - 1} ids to be read out of one position"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        inputs_BL = draws.below(config.plain_ids, config.seq_len)
        mask_BL = np.ones(inputs_BL.shape, dtype=bool)
        if config.frac_noise:
            noise_BL = draws.chance(config.frac_noise, config.seq_len)
            np.put_along_axis(noise_BL, draws.below(config.seq_len - 1, 1), False, axis=1)  # one id at least
            ids_BL = config.plain_ids + draws.below(config.noise_vocab_size, config.seq_len)
            inputs_BL = np.where(noise_BL, ids_BL, inputs_BL)
            mask_BL = ~noise_BL | config.score_noise
        inputs_BL[:, -1] = config.vocab_size - 1
        mask_BL[:, -1] = config.score_marker
        return Examples(inputs_BL, inputs_BL.copy(), mask_BL)
