"""Patterns one edit away: the moves of a mutation or a local search, on the expanded layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hybridnas.arch.pattern import Layer, Pattern, parse
from hybridnas.errors import ConfigError, PatternError


def neighbors(
    pattern: Pattern | str, letters: Iterable[str], *, min_depth: int = 1, max_depth: int | None = None
) -> list[tuple[str, Pattern]]:
    """Return every pattern one insert, delete, substitute or swap of adjacent layers away, with a text of the move.

    ``letters`` spells the layers that may come in, each a pattern of one layer: ``"ME"``, ``["M", "A@s", "[M,E]"]``.
    The order is fixed, the pattern itself and repeats are left out. Depths [layers] bound the result.
    Raises PatternError for a letter that is not one layer, ConfigError for depths that leave nothing.
    """
    start = parse(pattern) if isinstance(pattern, str) else pattern
    if min_depth < 1 or (max_depth is not None and max_depth < min_depth):
        raise ConfigError(
            f"neighbors needs 1 <= min_depth <= max_depth, got {min_depth=} and {max_depth=}",
            field="min_depth",
            got=(min_depth, max_depth),
            allowed="1 <= min_depth <= max_depth",
        )
    seen = {start.layers}
    found: list[tuple[str, Pattern]] = []
    for move, layers in _moves(start.layers, [_one_layer(letter) for letter in letters]):
        if layers in seen or len(layers) < min_depth or (max_depth is not None and len(layers) > max_depth):
            continue
        seen.add(layers)
        edited = Pattern(layers)
        # Two slots of one share name must agree, which only a spelled pattern is checked for.
        found.append((move, parse(str(edited)) if any(slot.share for slot in edited.slots) else edited))
    return found


def _moves(layers: tuple[Layer, ...], letters: list[Layer]) -> Iterator[tuple[str, tuple[Layer, ...]]]:
    for at in range(len(layers) + 1):
        for letter in letters:
            yield f"insert {letter} at {at}", (*layers[:at], letter, *layers[at:])
    for at, layer in enumerate(layers):
        yield f"delete {layer} at {at}", layers[:at] + layers[at + 1 :]
    for at, layer in enumerate(layers):
        for letter in letters:
            yield f"substitute {layer} by {letter} at {at}", (*layers[:at], letter, *layers[at + 1 :])
    for at in range(len(layers) - 1):
        left, right = layers[at : at + 2]
        yield f"swap {left} and {right} at {at}", (*layers[:at], right, left, *layers[at + 2 :])


def _one_layer(letter: str) -> Layer:
    layers = parse(letter).layers
    if len(layers) != 1:
        raise PatternError(
            f"letter {letter!r} spells {len(layers)} layers; a move puts in one, e.g. 'M' or '[M,E]'",
            field="letters",
            got=letter,
            allowed="one layer",
        )
    return layers[0]
