"""Fit an architecture to a target of active parameters with whatever its letters leave free."""

from __future__ import annotations

from hybridnas.arch.arch import Arch
from hybridnas.arch.match import match, match_share
from hybridnas.arch.pattern import Pattern
from hybridnas.errors import MatchError
from hybridnas.registry import BLOCKS

TOLERANCE = 0.02  # a candidate farther from the target than this is not a fair comparison [fraction]
_WIDTHS = ("d_expert", "d_ff", "d_inner")  # in the order in which they give way


def fit(arch: Arch, target: int, multiple: int = 8, share: float | None = None) -> Arch:
    """Return the architecture with sizes changed so that its active parameters meet the target within 2 %.

    Expert and MLP widths give way first, so that Mamba keeps its expansion; where that does not suffice, all widths
    move together. With ``share``, mixers get that share of the blocks' active parameters. Raises MatchError.
    """
    free = [name for name in _WIDTHS if _has(arch.pattern, name)]
    if not free:
        raise MatchError(f"pattern '{arch.pattern}' has no width to size (no E, F or M); add one of them")
    if share is not None and share_free(arch.pattern):
        then = tuple(name for name in free if name != "d_inner")
        return _close_enough(match_share(arch, active_params=target, share=share, then=then, multiple=multiple), target)
    outer = tuple(name for name in free if name != "d_inner") or ("d_inner",)
    try:
        return _close_enough(match(arch, active_params=target, free=outer, multiple=multiple), target)
    except MatchError:
        if len(free) == len(outer):
            raise
        return _close_enough(match(arch, active_params=target, free=tuple(free), multiple=multiple), target)


def share_free(pattern: Pattern) -> bool:
    """Whether a pattern has both a mixer with an inner width and experts or MLPs, so that a split means something."""
    return _has(pattern, "d_inner") and (_has(pattern, "d_expert") or _has(pattern, "d_ff"))


def _has(pattern: Pattern, name: str) -> bool:
    return any(
        name in BLOCKS.get(slot.letter).Config.field_names() and name not in dict(slot.args) for slot in pattern.slots
    )


def _close_enough(arch: Arch, target: int) -> Arch:
    got = arch.cost().active_params
    if abs(got - target) > TOLERANCE * target:
        raise MatchError(
            f"pattern '{arch.pattern}' comes no nearer to {target:,} active parameters than {got:,} "
            f"({(got - target) / target:+.1%}); allow a smaller multiple or another split"
        )
    return arch
