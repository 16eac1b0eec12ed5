"""``data=variable_tracking``: follow assignments from variable to variable back to a value (RULER, arXiv 2404.06654).

Ids: 0 filler, 1 "set", 2 "what is", then ``n_values`` values, then variables. An assignment is "set", a variable, and
its source: a value, or a variable that was set before. Several chains of ``n_hops`` assignments after the first run
through the text in random order; at the end "what is" and the last variable of one chain, whose value is the target.
Scored: the last place alone. RULER asks for all variables of a value; with one answer no lists need comparing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws
from hybridnas.data.task import Examples, Task, TaskConfig, register_task

FILLER, SET, ASK = 0, 1, 2
FIRST_VALUE = 3


@dataclass(frozen=True, kw_only=True)
class VariableTrackingConfig(TaskConfig):
    """Settings of variable tracking."""

    kind: str = option("variable_tracking", "kind of data, a name in SOURCES")
    vocab_size: int = option(64, "different ids: three marks, values, variables [count]", ge=6)
    seq_len: int = option(128, "length of an example, the question included [tokens]", ge=5)
    n_chains: int = option(3, "values that are handed on [count]", ge=1)
    n_hops: int = option(2, "variables that a value is handed on to after the first [count]", ge=0)
    n_values: int = option(16, "different values [count]", ge=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 3 * self.assignments + 2
        self.require(
            self.seq_len >= least,
            f"n_chains={self.n_chains} with n_hops={self.n_hops} need seq_len >= {least}, got {self.seq_len}",
        )
        self.require(
            self.n_variables >= self.assignments,
            f"vocab_size={self.vocab_size} leaves {self.n_variables} variables for {self.assignments} assignments",
        )

    @property
    def assignments(self) -> int:
        """Assignments of an example [count]."""
        return self.n_chains * (self.n_hops + 1)

    @property
    def n_variables(self) -> int:
        """Different variables [count]."""
        return self.vocab_size - FIRST_VALUE - self.n_values


@register_task("variable_tracking", config=VariableTrackingConfig)
class VariableTracking(Task):
    """The value that a chain of assignments began with."""

    config: VariableTrackingConfig

    def words(self) -> str:
        return (
            f"the value at the beginning of one of {self.config.n_chains} chains of {self.config.n_hops + 1} variables"
        )

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        count, links = config.assignments, config.n_hops + 1
        rows = np.arange(len(draws))[:, None]
        inputs_BL = np.full((len(draws), config.seq_len), FILLER, dtype=np.int64)
        values_BC = FIRST_VALUE + draws.below(config.n_values, config.n_chains)
        variables_BK = FIRST_VALUE + config.n_values + draws.distinct(config.n_variables, count)
        chained_BCH = variables_BK.reshape(-1, config.n_chains, links)  # the variables of each chain in order
        chain_BK = draws.order(count) % config.n_chains  # whose assignment comes at each turn
        turn_BK = np.argsort(np.argsort(chain_BK, axis=1, kind="stable"), axis=1, kind="stable") % links
        sources_BCH = np.concatenate((values_BC[..., None], chained_BCH[..., :-1]), axis=2)
        gaps_BK = np.sort(draws.below(config.seq_len - 2 - 3 * count + 1, count), axis=1)
        starts_BK = gaps_BK + 3 * np.arange(count)
        inputs_BL[rows, starts_BK] = SET
        inputs_BL[rows, starts_BK + 1] = chained_BCH[rows, chain_BK, turn_BK]
        inputs_BL[rows, starts_BK + 2] = sources_BCH[rows, chain_BK, turn_BK]
        asked_B1 = draws.below(config.n_chains, 1)
        inputs_BL[:, -2] = ASK
        inputs_BL[:, -1:] = chained_BCH[rows, asked_B1, links - 1]
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -1:] = values_BC[rows, asked_B1]
        mask_BL = np.zeros(inputs_BL.shape, dtype=bool)
        mask_BL[:, -1] = True
        return Examples(inputs_BL, targets_BL, mask_BL)
