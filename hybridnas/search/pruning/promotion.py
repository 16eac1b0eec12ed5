"""Successive halving applied to a study's records: which candidate is promoted, which is paused, which is resumed.

A candidate keeps its number, folder and record from its first step to its last. A paused one is a record in state
PRUNED; promoting it is one step from PRUNED to RUNNING, which a single process can make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybridnas.search.history import History
from hybridnas.search.pruning import halving

KEPT_PAUSED = 64  # checkpoints of paused candidates, best chance first; a disk is finite even where n_trials is not


@dataclass(frozen=True)
class Promotion:
    """The rungs of a study and what is decided at them; all from its records, so any process decides alike."""

    rungs: tuple[int, ...]  # training tokens, rising
    reduction: int
    n_trials: int

    @property
    def remainder(self) -> float:
        """Share of a full training that is left to a candidate that goes on from the last rung before its end."""
        return 1.0 - self.rungs[-2] / self.rungs[-1] if len(self.rungs) > 1 else 1.0

    def goes_on(self, history: History, number: int, tokens: int, values: Mapping[str, float]) -> bool:
        """Whether a candidate with these objectives after ``tokens`` trains on at once; True between rungs."""
        if tokens not in self.rungs[:-1]:
            return True
        return halving.goes_on({tokens: history.scores_with(tokens, number, values)}, self.reduction, tokens, number)

    def next(self, history: History) -> int | None:
        """Return the paused candidate that should go on now, or None.

        Once as many as were asked for are there and none of them has been trained to the end (a short search, without
        baselines), it is the best of the highest rung: a search ends with a winner.
        """
        scores = history.scores
        found = halving.next_promotion(scores, self.reduction, history.running)
        if found is not None or history.running or scores[self.rungs[-1]] or history.finished < self.n_trials:
            return found
        highest = next((scores[rung] for rung in reversed(self.rungs) if scores[rung]), {})
        return next(iter(halving.ranked(highest)), None)

    def may_return(self, history: History) -> list[int]:
        """Return the paused candidates whose checkpoints are worth keeping, at most KEPT_PAUSED."""
        to_come = max(0, self.n_trials - history.finished)
        return halving.may_return(history.scores, self.reduction, to_come)[:KEPT_PAUSED]
