"""``data=induction_heads``: after a trigger seen once before, say what followed it (Mamba, arXiv 2312.00752, table 11).

Random tokens (ids 0 to V-2), somewhere among them the trigger (id V-1); the last token is the trigger again, and the
target there is the token that followed the first one. Scored: the last place alone. We know no
public generator of the paper's; H3's (HazyResearch/safari, synthetics.py) puts at least one token between the answer
and the last trigger, and so do we (``n_between``; 0: also "trigger, answer, trigger" at the end).

The paper's sizes: 16 ids, 256 tokens in training and 2^6 to 2^20 in evaluation, fresh examples, batches of 8, 204,800
steps, a constant learning rate, two layers, no weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task
from hybridnas.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class InductionHeadsConfig(TaskConfig):
    """Settings of induction heads."""

    kind: str = option("induction_heads", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids, the trigger included [count]", ge=3)
    seq_len: int = option(256, "length of an example, the last trigger included [tokens]", ge=4)
    n_between: int = option(1, "tokens between the answer and the last trigger at least [count]", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.n_between + 3  # trigger, answer, what is between, trigger
        if self.seq_len < least:
            raise ConfigError(f"{self.kind}: n_between={self.n_between} needs seq_len >= {least}, got {self.seq_len}")


@register_task("induction_heads", config=InductionHeadsConfig)
class InductionHeads(Task):
    """Induction heads."""

    config: InductionHeadsConfig

    def words(self) -> str:
        return "say what followed the trigger before"

    def make(self, draws: Draws, train: bool) -> Examples:
        length, trigger = self.config.seq_len, self.config.vocab_size - 1
        inputs_BL = draws.below(trigger, length)
        place_B1 = draws.below(length - 2 - self.config.n_between, 1)
        np.put_along_axis(inputs_BL, place_B1, trigger, axis=1)
        inputs_BL[:, -1] = trigger
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -1:] = np.take_along_axis(inputs_BL, place_B1 + 1, axis=1)
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
