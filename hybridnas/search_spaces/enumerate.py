"""Every combination of choices that a space can draw, in order, without a sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from hybridnas.errors import HybridNASError
from hybridnas.search_spaces.space import Scale, Space


class _Walker:
    """A Chooser that follows a path of option indices and takes the first option beyond its end."""

    def __init__(self, path: Sequence[int]) -> None:
        self._path = path
        self.taken: list[int] = []
        self.widths: list[int] = []
        self.choices: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name not in self.choices:
            at = len(self.taken)
            self.taken.append(self._path[at] if at < len(self._path) else 0)
            self.widths.append(len(choices))
            self.choices[name] = choices[self.taken[-1]]
        return self.choices[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None) -> float:
        assert step is not None
        steps = [low + step * i for i in range(int((high - low) / step + 1e-9) + 1)]
        return float(self.suggest_categorical(name, steps))


def every_choice(space: Space, scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the parameters of every draw that ``space`` allows, infeasible ones included, in a fixed order."""
    path: list[int] = []
    while True:
        walker = _Walker(path)
        with contextlib.suppress(HybridNASError):  # of a draw that no architecture fits: the search records why
            space.choose(walker, scale)
        yield walker.choices
        path = list(walker.taken)
        while path and path[-1] == walker.widths[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1
