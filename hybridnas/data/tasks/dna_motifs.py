"""``data=dna_motifs``: which motif stands first in a sequence of nucleotides, on either strand?

Random bases (ids 0 to 3: A C G T) and a question (id 4) at the end; the target there is the id of the motif (5 and
more) that begins furthest to the left, as it is or as its reverse complement. One is put in at a random place, and one
that chance makes counts as well, so that the sequence alone decides and the answer is known. Motifs are drawn from
``task_seed``, no two the same on either strand. Scored: the last place alone.

A filter that finds motifs, such as a short convolution, and a memory for the first that came solve it: what models of
DNA need for binding sites (compare the motif tasks of Zhou and Troyanskaya, 2015, Nature Methods 12, on real sites).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import I64, Draws, keys_of
from hybridnas.data.task import Examples, Task, TaskConfig, register_task

BASES = 4
QUESTION = 4


@dataclass(frozen=True, kw_only=True)
class DnaMotifsConfig(TaskConfig):
    """Settings of DNA motifs."""

    kind: str = option("dna_motifs", "kind of data, a name in SOURCES")
    vocab_size: int = option(13, "different ids: four bases, the question, and one for each motif [count]", ge=7)
    seq_len: int = option(128, "length of an example, the question included [tokens]", ge=4)
    width: int = option(8, "length of a motif [bases]", ge=2, le=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.width < self.seq_len, f"width={self.width} needs seq_len > {self.width}, got {self.seq_len}")
        most = BASES**self.width // 4
        self.require(
            self.n_motifs <= most,
            f"vocab_size={self.vocab_size} asks for {self.n_motifs} motifs, of width={self.width} there are at most "
            f"{most}",
        )

    @property
    def n_motifs(self) -> int:
        """Motifs [count]."""
        return self.vocab_size - BASES - 1


def motifs(config: DnaMotifsConfig) -> I64:
    """Return the motifs' bases (M, width); no motif is another one or its reverse complement."""
    draws = Draws(keys_of(np.array([0], dtype=np.int64), config.kind, "motifs", config.task_seed))
    weights = BASES ** np.arange(config.width)
    found: list[I64] = []
    taken: set[int] = set()
    while len(found) < config.n_motifs:
        motif = draws.below(BASES, config.width)[0]
        codes = {int(motif @ weights), int((BASES - 1 - motif[::-1]) @ weights)}
        if not codes & taken:
            taken |= codes
            found.append(motif)
    return np.stack(found)


@register_task("dna_motifs", config=DnaMotifsConfig)
class DnaMotifs(Task):
    """The first of several motifs, on either strand."""

    config: DnaMotifsConfig

    @cached_property
    def _motif_of(self) -> I64:
        """Which motif a window of bases is, by its bases as digits, -1 where it is none (4^width,)."""
        weights = BASES ** np.arange(self.config.width)
        table = np.full(BASES**self.config.width, -1, dtype=np.int64)
        for number, motif in enumerate(motifs(self.config)):
            table[int(motif @ weights)] = table[int((BASES - 1 - motif[::-1]) @ weights)] = number
        return table

    def words(self) -> str:
        return f"the first of {self.config.n_motifs} motifs of {self.config.width} bases on either strand"

    def make(self, draws: Draws, train: bool) -> Examples:
        width, length = self.config.width, self.config.seq_len
        inputs_BL = draws.below(BASES, length)
        inputs_BL[:, -1] = QUESTION
        motif_BW = motifs(self.config)[draws.below(self.config.n_motifs, 1)[:, 0]]
        motif_BW = np.where(draws.chance(0.5, 1), motif_BW, BASES - 1 - motif_BW[:, ::-1])
        places_BW = draws.below(length - width, 1) + np.arange(width)
        np.put_along_axis(inputs_BL, places_BW, motif_BW, axis=1)
        windows_BPW = np.lib.stride_tricks.sliding_window_view(inputs_BL[:, :-1], width, axis=1)
        numbers_BP = self._motif_of[windows_BPW @ BASES ** np.arange(width)]
        first_B = (numbers_BP >= 0).argmax(axis=1)
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -1] = BASES + 1 + np.take_along_axis(numbers_BP, first_B[:, None], axis=1)[:, 0]
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
