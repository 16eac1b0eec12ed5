"""Messages from a search command to a worker that it starts: settings, token, number, start time, plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridnas.search.config import SearchConfig
from hybridnas.search.training import Wanted


@dataclass(frozen=True)
class Orders:
    """They travel through a pipe: nothing of them is seen in a process list or lies on a disk."""

    config: Mapping[str, Any]
    token: str  # lets the worker into the folder that its parent holds
    worker: int
    started: float  # of the command [Unix time]
    again: Sequence[Wanted] = ()  # what to train instead of trials, shared with the other workers
    plugins: Sequence[Mapping[str, str]] = ()  # files that the command has loaded

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Orders:
        """Return the orders that a message holds."""
        return cls(**{**message, "again": [Wanted(*one) for one in message["again"]]})

    def search_config(self) -> SearchConfig:
        """Return the settings of the search, as a worker runs them: without MLflow and without workers of its own."""
        return SearchConfig.from_dict({**self.config, "tracking": "off", "workers": 1})
