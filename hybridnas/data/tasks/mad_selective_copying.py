"""``data=mad_selective_copying``: copy tokens that lie among blanks (MAD, arXiv 2403.17844).

``n_tokens_to_copy`` tokens (ids 0 to V-3) in order, blanks (id V-2) between them, then one marker (id V-1), then as
many blanks as tokens: at the j-th of them the target is the j-th token. Scored: these last blanks. Unlike the Mamba
paper's form (``selective_copying``) there is one marker alone, and blanks fall into gaps: each blank goes into one of
the gaps between tokens, all equally likely (``placing=gaps``, as mad-lab's code does), or every set of places is
equally likely (``placing=even``).

The paper's sizes: 16 ids, 256 tokens, 16 to copy, 12,800 examples to train on; one at a time vocab_size 32, 64, 128,
seq_len 512, 1024, n_train_examples 6400, 3200, 1600, 800, n_tokens_to_copy 32, 64, 96. Two differences from mad-lab's
code: it draws the gaps from numpy's global generator, whatever seed was given (here they are seeded like the rest),
and no blank ever comes after the last token, so that it always stands before the marker; ``blank_after_last=false``
brings that back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import I64, Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task


@dataclass(frozen=True, kw_only=True)
class MadSelectiveCopyingConfig(TaskConfig):
    """Settings of MAD's selective copying."""

    kind: str = option("mad_selective_copying", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids, blank and marker included [count]", ge=4)
    seq_len: int = option(256, "length of an example, the copy included [tokens]", ge=4)
    n_tokens_to_copy: int = option(16, "tokens to copy [count]", ge=1)
    placing: str = option(
        "gaps", "each blank in any gap, or any set of places, equally likely", choices=("gaps", "even")
    )
    blank_after_last: bool = option(True, "blanks may follow the last token; no: never, as in mad-lab [yes/no]")
    n_train_examples: int | None = option(12_800, "examples of the training set; none: fresh ones", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 2 * self.n_tokens_to_copy + 2
        self.require(
            self.seq_len >= least,
            f"n_tokens_to_copy={self.n_tokens_to_copy} need seq_len >= {least} (tokens, a blank, a marker, the copy), "
            f"got {self.seq_len}",
        )


@register_task("mad_selective_copying", config=MadSelectiveCopyingConfig)
class MadSelectiveCopying(Task):
    """Selective copying with one marker."""

    config: MadSelectiveCopyingConfig

    def words(self) -> str:
        return f"copy {self.config.n_tokens_to_copy} tokens from among blanks"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        count, length, blank = config.n_tokens_to_copy, config.seq_len, config.vocab_size - 2
        tokens_BK = draws.below(blank, count)
        inputs_BL = np.full((len(draws), length), blank, dtype=np.int64)
        np.put_along_axis(inputs_BL, self._places(draws, length - count - 1), tokens_BK, axis=1)
        inputs_BL[:, length - count - 1] = blank + 1
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -count:] = tokens_BK
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -count:] = True
        return Examples(inputs_BL, targets_BL, mask_BL)

    def _places(self, draws: Draws, length: int) -> I64:
        """Return (B, K) where the tokens stand among ``length`` places, rising."""
        config = self.config
        count = config.n_tokens_to_copy
        if config.placing == "even":
            if config.blank_after_last:
                return np.sort(draws.distinct(length, count), axis=1)
            last_B1 = np.full((len(draws), 1), length - 1, dtype=np.int64)
            return np.concatenate((np.sort(draws.distinct(length - 1, count - 1), axis=1), last_B1), axis=1)
        gaps = count + config.blank_after_last
        gap_BN = draws.below(gaps, length - count)
        flat = gap_BN + np.arange(len(draws))[:, None] * gaps
        blanks_BG = np.bincount(flat.reshape(-1), minlength=len(draws) * gaps).reshape(-1, gaps)
        places: I64 = np.cumsum(blanks_BG[:, :count], axis=1) + np.arange(count)
        return places
