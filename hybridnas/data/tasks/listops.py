"""``data=listops``: what a nested list of operations on digits is worth (ListOps, arXiv 1804.06028).

``[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]`` is worth 5. Operators are MAX, MIN, MED (the median, rounded down) and SM
(the sum modulo 10), as in the paper and in the Long Range Arena (arXiv 2011.04006). Ids: 0 to 9 the digits, 10 to 13
the operators with their bracket, 14 the closing bracket, 15 the filler in front of expressions that are shorter than an
example. Scored: the last place, the outermost closing bracket, whose target is the digit that the whole is worth.

Unlike the Arena's generator, which draws a tree and keeps what is 500 to 2,000 tokens long, the length is drawn first
(half to all of an example) and tokens are drawn so that all brackets can be closed within it, for all examples at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import I64, Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task

if TYPE_CHECKING:
    from torch import nn

DIGITS = 10
MAX, MIN, MED, SM = range(10, 14)
CLOSE, FILLER = 14, 15
OPEN_CHANCE, CLOSE_CHANCE = 0.25, 0.2  # of a nested list, and of an end, where both are possible


@dataclass(frozen=True, kw_only=True)
class ListopsConfig(TaskConfig):
    """Settings of ListOps."""

    kind: str = option("listops", "kind of data, a name in SOURCES")
    vocab_size: int = option(
        16, "different ids: ten digits, four operators, a bracket, the filler [count]", ge=16, le=16
    )
    seq_len: int = option(128, "length of an example, filler included [tokens]", ge=6)
    depth: int = option(6, "lists within one another at most [count]", ge=1, le=32)
    pool: str = option(
        "last", "what the answer is read from: the last position, or the mean of all", choices=("last", "mean")
    )


@register_task("listops", config=ListopsConfig)
class Listops(Task):
    """The value of nested operations on digits."""

    config: ListopsConfig

    def __init__(self, config: ListopsConfig) -> None:
        super().__init__(config)
        self.head = "mean" if config.pool == "mean" else None

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        if self.head is None:
            return {}
        from hybridnas.data.heads.pool import MeanPool

        return {"mean": MeanPool()}

    def words(self) -> str:
        return f"the value of up to {self.config.depth} lists of digits within one another"

    def make(self, draws: Draws, train: bool) -> Examples:
        length, rows = self.config.seq_len, np.arange(len(draws))
        left_B = length // 2 + draws.below(length - length // 2 + 1, 1)[:, 0]  # tokens still to be written
        choice_BL, nested_BL = draws.uniform(length), draws.uniform(length)
        digit_BL, operator_BL = draws.below(DIGITS, length), MAX + draws.below(4, length)
        inputs_BL = np.full((len(draws), length), FILLER, dtype=np.int64)
        operator_BK = np.zeros((len(draws), self.config.depth + 1), dtype=np.int64)  # of the open lists
        counts_BKV = np.zeros((len(draws), self.config.depth + 1, DIGITS), dtype=np.int64)  # and their values
        depth_B = np.zeros(len(draws), dtype=np.int64)
        for place in range(length):
            writes_B = left_B == length - place
            left_after_B = left_B - 1
            empty_B = counts_BKV[rows, depth_B].sum(axis=1) == 0
            # A list has at least one value; the outermost one ends with the last token and no sooner.
            closes_B = writes_B & (depth_B > 0) & ~empty_B
            must_close_B = closes_B & (left_B <= depth_B)
            can_close_B = closes_B & (depth_B > 1) & (left_after_B >= depth_B - 1)
            can_open_B = writes_B & (depth_B < self.config.depth) & (left_after_B >= depth_B + 2)
            opens_B = (can_open_B & (nested_BL[:, place] < OPEN_CHANCE) & ~must_close_B) | (writes_B & (depth_B == 0))
            closes_B = must_close_B | (can_close_B & ~opens_B & (choice_BL[:, place] < CLOSE_CHANCE))
            plain_B = writes_B & ~opens_B & ~closes_B
            inputs_BL[plain_B, place] = digit_BL[plain_B, place]
            inputs_BL[opens_B, place] = operator_BL[opens_B, place]
            inputs_BL[closes_B, place] = CLOSE
            counts_BKV[rows[plain_B], depth_B[plain_B], digit_BL[plain_B, place]] += 1
            depth_B[opens_B] += 1
            operator_BK[rows[opens_B], depth_B[opens_B]] = operator_BL[opens_B, place]
            counts_BKV[rows[opens_B], depth_B[opens_B]] = 0
            ended = rows[closes_B]
            worth = value_of(operator_BK[ended, depth_B[ended]], counts_BKV[ended, depth_B[ended]])
            depth_B[ended] -= 1
            counts_BKV[ended, depth_B[ended], worth] += 1
            left_B = np.where(writes_B, left_after_B, left_B)
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -1] = counts_BKV[:, 0].argmax(axis=1)  # the one value that is in no list
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)


def value_of(operator_B: I64, counts_BV: I64) -> I64:
    """Return what lists are worth, by their operators and how often each digit is in them."""
    total_B = counts_BV.sum(axis=1)
    upto_BV = counts_BV.cumsum(axis=1)
    lower_B = (upto_BV > ((total_B - 1) // 2)[:, None]).argmax(axis=1)
    upper_B = (upto_BV > (total_B // 2)[:, None]).argmax(axis=1)
    worth = {
        MAX: DIGITS - 1 - (counts_BV[:, ::-1] > 0).argmax(axis=1),
        MIN: (counts_BV > 0).argmax(axis=1),
        MED: (lower_B + upper_B) // 2,
        SM: counts_BV @ np.arange(DIGITS) % DIGITS,
    }
    return np.choose(operator_B - MAX, [worth[one] for one in (MAX, MIN, MED, SM)])
