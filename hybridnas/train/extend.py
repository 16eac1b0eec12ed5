"""More tokens for a run that has ended: with schedule ``wsd`` it goes on from the state before its last decay.

The longer run is the one that would have been annealed at both token counts: ``anneal_at`` names the old end, and
``warmup_fraction`` is such that warm-up took as many tokens. ``run.json`` keeps what was asked for, so that the same
call again finds its run, and the settings of the shorter run, whose checkpoint is taken up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hybridnas.errors import CheckpointError
from hybridnas.train.config import TrainConfig

ASKED, SHORTER = "asked", "shorter"  # in run.json: settings as identity() gives them
_MAY_DIFFER = ("tokens", "warmup_fraction", "anneal_at", "eval_at")


class Extension(NamedTuple):
    """A run with its settings as they are, those asked for, and those of the run that it goes on from."""

    config: TrainConfig
    asked: dict[str, Any] | None = None  # None: it was trained in one piece
    shorter: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it; nothing for a run in one piece."""
        return {} if self.asked is None else {ASKED: self.asked, SHORTER: self.shorter}


def extended(stored: Mapping[str, Any], config: TrainConfig, folder: Path) -> Extension:
    """Return the run that ``config`` asks for in a folder whose ``run.json`` is ``stored``, its other parts equal.

    Raises CheckpointError for more tokens after a schedule that has no state to go on from.
    """
    old, asked = stored["train"], config.identity()
    if asked == old:
        return Extension(config, stored.get(ASKED), stored.get(SHORTER))
    points = (*old.get("anneal_at", ()), old["tokens"])
    if asked == stored.get(ASKED):
        longer = config.replace(warmup_fraction=old["warmup_fraction"], anneal_at=tuple(old["anneal_at"]))
        return Extension(longer, asked, stored[SHORTER])
    fixed = [key for key in dict.fromkeys((*old, *asked)) if key not in _MAY_DIFFER]
    ended = stored["final"] and stored["status"] == "completed"
    more = config.steps > -(-old["tokens"] // config.step_tokens)
    if not (ended and more and all(old.get(key) == asked.get(key) for key in fixed)):
        return Extension(config)
    if config.schedule != "wsd":
        raise CheckpointError(
            f"{folder} holds a finished run of {old['tokens']:,} tokens with schedule={config.schedule}, and only wsd "
            f"keeps a state to go on from; model={folder} with train.tokens={config.tokens - old['tokens']} and "
            f"another folder starts again from its weights, with a new warm-up",
            field="train.tokens",
            got=config.tokens,
            allowed=old["tokens"],
        )
    warmup = old["warmup_fraction"] * (old["tokens"] / config.tokens)
    known = (warmup, old["warmup_fraction"], (stored.get(ASKED) or old)["warmup_fraction"])
    earlier = [point for point in config.anneal_at if point <= old["tokens"]]
    if not any(math.isclose(config.warmup_fraction, value) for value in known) or not set(earlier) <= set(points):
        return Extension(config)
    later = [point for point in config.anneal_at if point > old["tokens"]]
    return Extension(config.replace(warmup_fraction=warmup, anneal_at=(*points, *later)), asked, dict(old))
