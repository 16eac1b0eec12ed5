"""Fit an architecture to a target of active parameters with whatever its letters leave free."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from hybridnas.arch.arch import Arch
from hybridnas.arch.match import MAX_WIDTH, match, sizes_of, widths_of
from hybridnas.arch.pattern import Pattern, Slot
from hybridnas.errors import ConfigError, MatchError
from hybridnas.registry import BLOCKS

TOLERANCE = 0.02  # a candidate farther from the target than this is not a fair comparison [fraction]
STATE_TOLERANCE = 0.05  # the same for the state's bytes, which come in larger steps [fraction]
_HALVINGS = 40  # of the interval of sizes; widths are whole numbers up to 2 ** 20
_STEPS = 16  # sizes tried around one that a block refuses
_FINE = 2  # the finest step of a head's channels, which turn in pairs [channels]
_FIRST = ("d_expert", "d_ff")  # widths that give way first: experts and MLPs


def fit(arch: Arch, target: int, multiple: int = 8, share: float | None = None) -> Arch:
    """Return the architecture with sizes changed so that its active parameters meet the target within 2 %.

    Expert and MLP widths give way first, so that mixers (Mamba and others with an inner width) keep theirs; where that
    does not suffice, all widths move together. With ``share``, mixers get that share of the blocks' active parameters.
    A pattern without any width, such as one of attention alone, is sized by what its blocks declare as sizable
    (channels of a head), in steps of 2 where ``multiple`` is too coarse, else by ``d_model``. Raises MatchError.
    """
    free = _free(arch.pattern)
    if not free:
        return _without_widths(arch, target, multiple)
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


def _without_widths(arch: Arch, target: int, multiple: int) -> Arch:
    """Return an architecture without widths, sized by its heads or else its ``d_model``; raises MatchError."""
    heads = {name for s in arch.pattern.slots for name in sizes_of(s.letter) if name not in dict(s.args)}
    ways = [(tuple(sorted(heads)), step) for step in (multiple, _FINE) if heads]
    tried: MatchError | ConfigError | None = None
    for free, step in [*ways, (("d_model",), multiple), (("d_model",), _FINE)]:
        try:
            return _close_enough(match(_opened(arch, free), active_params=target, free=free, multiple=step), target)
        except (MatchError, ConfigError) as error:
            tried = tried or error
    assert tried is not None
    raise tried if isinstance(tried, MatchError) else MatchError(str(tried), field=tried.field, got=tried.got)


def _opened(arch: Arch, free: Sequence[str]) -> Arch:
    """Return the architecture with a size, any, for the free fields that its blocks leave open: matching scales it."""
    fields: dict[str, dict[str, int]] = {}
    for node in arch.nodes:
        for name in free:
            config = node.config
            if name != "d_model" and name in config.field_names() and config.canonical().get(name) is None:
                fields.setdefault(node.slot.letter, {})[name] = max(2, node.config.d_model // 2 * 2)
    return arch.replace(**fields) if fields else arch


def spread(arch: Arch, target: int, ratios: Sequence[float], multiple: int = 8) -> Arch:
    """Return the architecture with the widths of expert and MLP layers at given proportions, active parameters kept.

    ``ratios`` has one number per layer; each width is the nearest multiple of ``multiple`` to its layer's ratio times
    one common width. Slots that pin their width keep it. Raises MatchError.
    """

    def at(common: float) -> Arch:
        def args(layer: int, slot: Slot) -> dict[str, int]:
            width = multiple * max(1, round(common * ratios[layer] / multiple))
            return {name: width for name in widths_of(slot.letter) if name in _FIRST}

        return arch.replace(pattern=arch.pattern.with_args(args))

    least, most = multiple / max(ratios), MAX_WIDTH / max(ratios)
    return _close_enough(_nearest(at, least, most, lambda found: found.cost().active_params, target), target)


def with_state(arch: Arch, target: int, seq_len: int, *, tolerance: float = STATE_TOLERANCE) -> Arch:
    """Return the architecture with the sizes of its blocks' states scaled so that one sequence carries ``target``.

    All fields that its blocks declare as ``state_sizes`` take one common factor of their present sizes, rounded to
    whole numbers; ``target`` is in bytes, at ``seq_len`` tokens. Raises MatchError where nothing can be scaled or the
    nearest is farther from the target than ``tolerance`` [fraction].
    """
    sizes = {
        (node.slot.letter, name): node.config.canonical()[name]
        for node in arch.nodes
        for name in type(node.config).state_sizes
        if name in type(node.config).field_names() and name not in dict(node.slot.args)
    }
    if not sizes:
        raise MatchError(
            f"pattern '{arch.pattern}' has no block whose state can be sized, so that state_bytes cannot be made equal",
            field="space.equal",
            got=str(arch.pattern),
            allowed=[
                x
                for x in BLOCKS
                if any(n in BLOCKS.get(x).Config.field_names() for n in BLOCKS.get(x).Config.state_sizes)
            ],
        )

    def at(factor: float) -> Arch:
        fields: dict[str, dict[str, int]] = {}
        for (letter, name), size in sizes.items():
            fields.setdefault(letter, {})[name] = max(1, round(factor * size))
        return arch.replace(**fields)

    def off(one: Arch) -> int:
        return abs(one.cost(seq_len).state_bytes - target)

    scaled = _nearest(at, 1 / max(sizes.values()), 4096.0, lambda one: one.cost(seq_len).state_bytes, target)
    found = min((arch, scaled), key=off)  # the present sizes fit
    if off(found) > tolerance * target:  # sizes that have to divide a width are few: halving intervals passes them over
        whole = max(sizes.values())
        found = min((found, *_accepted(at, [size / whole for size in range(1, 2 * whole)])), key=off)
    got = found.cost(seq_len).state_bytes
    if abs(got - target) > tolerance * target:
        raise MatchError(
            f"pattern '{arch.pattern}' comes no nearer to {target:,} state bytes at {seq_len:,} tokens than {got:,} "
            f"({(got - target) / target:+.1%}); leave out letters whose state grows with the length, or set "
            f"space.state_bytes",
            field="space.equal",
            got=got,
            allowed=target,
        )
    return found


def _accepted(at: Callable[[float], Arch], factors: Iterable[float]) -> Iterator[Arch]:
    """Yield the architectures at those factors whose sizes no block refuses."""
    for factor in factors:
        with contextlib.suppress(ConfigError):
            yield at(factor)


def _nearest(at: Callable[[float], Arch], low: float, high: float, measure: Callable[[Arch], int], target: int) -> Arch:
    """Return the architecture of ``at(x)``, low <= x <= high, whose measure, rising with x, is nearest to the target.

    Sizes that a block refuses (a head that does not divide, for example) are passed over.
    """
    tried: dict[int, Arch] = {}

    def cost(x: float) -> int | None:
        try:
            arch = at(x)
        except ConfigError:
            return None
        got = measure(arch)
        tried.setdefault(got, arch)
        return got

    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        got = next((c for c in (cost(middle * (1 + step / 64)) for step in range(_STEPS)) if c is not None), None)
        if got == target:
            break
        low, high = (middle, high) if got is not None and got < target else (low, middle)
    if not tried:
        return at((low * high) ** 0.5)  # as a rule this raises the block's own reason
    return tried[min(tried, key=lambda got: (abs(got - target), got))]


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
