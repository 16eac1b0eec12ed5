"""Fit an architecture to a target of active parameters with whatever its letters leave free."""

from __future__ import annotations

from hybridnas.arch.arch import Arch
from hybridnas.arch.match import match, widths_of
from hybridnas.arch.pattern import Pattern
from hybridnas.errors import MatchError
from hybridnas.registry import BLOCKS

TOLERANCE = 0.02  # a candidate farther from the target than this is not a fair comparison [fraction]
_FIRST = ("d_expert", "d_ff")  # widths that give way first: experts and MLPs


def fit(arch: Arch, target: int, multiple: int = 8, share: float | None = None) -> Arch:
    """Return the architecture with sizes changed so that its active parameters meet the target within 2 %.

    Expert and MLP widths give way first, so that mixers (Mamba and others with an inner width) keep theirs; where that
    does not suffice, all widths move together. With ``share``, mixers get that share of the blocks' active parameters.
    Raises MatchError.
    """
    free = _free(arch.pattern)
    if not free:
        sizable = ", ".join(letter for letter in BLOCKS if widths_of(letter))
        raise MatchError(
            f"pattern '{arch.pattern}' has no width to size; add a letter that has one: {sizable}",
            field="pattern",
            got=str(arch.pattern),
            allowed=sizable,
        )
    outer = tuple(name for name in free if name in _FIRST)
    inner = tuple(name for name in free if name not in _FIRST)
    if share is not None and len(inner) == 1 and outer:
        return _close_enough(
            match(arch, active_params=target, free=(*inner, *outer), multiple=multiple, share=share), target
        )
    try:
        return _close_enough(match(arch, active_params=target, free=outer or inner, multiple=multiple), target)
    except MatchError:
        if not (outer and inner):
            raise
        return _close_enough(match(arch, active_params=target, free=free, multiple=multiple), target)


def share_free(pattern: Pattern) -> bool:
    """Whether a pattern has both mixers with one inner width and experts or MLPs, so that a split means something."""
    free = _free(pattern)
    return any(name in _FIRST for name in free) and sum(name not in _FIRST for name in free) == 1


def _free(pattern: Pattern) -> tuple[str, ...]:
    """Return the widths that a pattern's blocks declare and its slots do not pin, experts and MLPs first."""
    names = {name for slot in pattern.slots for name in widths_of(slot.letter) if name not in dict(slot.args)}
    return tuple(sorted(names, key=lambda name: (name not in _FIRST, name)))


def _close_enough(arch: Arch, target: int) -> Arch:
    got = arch.cost().active_params
    if abs(got - target) > TOLERANCE * target:
        raise MatchError(
            f"pattern '{arch.pattern}' comes no nearer to {target:,} active parameters than {got:,} "
            f"({(got - target) / target:+.1%}); allow a smaller multiple or another split",
            field="active_params",
            got=got,
            allowed=target,
        )
    return arch
