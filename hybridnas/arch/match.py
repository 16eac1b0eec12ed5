"""Size an architecture to a number of active parameters: the control that the MoE-Mamba paper computed by hand.

Free fields grow along one line: the widest takes every multiple in turn, the others keep their ratio to it as nearly as
the multiple allows. Active parameters rise along that line, so the nearest point is found by bisection, exactly.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hybridnas.arch.arch import FACTORS, Arch, overlay
from hybridnas.errors import ConfigError, MatchError, suggest
from hybridnas.layers.block import BlockConfig
from hybridnas.registry import BLOCKS

MAX_WIDTH = 2**20  # the widest size that is tried [channels]
_GAP = 4096  # how many multiples in a row may be impossible (heads that do not divide) before the search gives up
_WOBBLE = 512  # grouped-query attention makes the cost of d_model waver; this many multiples around are looked at
_MOST_COUNTS = 65536
_COUNTS: dict[Any, tuple[int, int]] = {}  # of blocks by class and values, see _counts
Ratio = Mapping[str, float] | Sequence[float] | None


@dataclass(frozen=True)
class Match:
    """A matched architecture and how near it came; all counts are active parameters per token, embeddings excluded."""

    arch: Arch
    target: int
    active_params: int
    reachable: tuple[int, int]  # least and most that the free fields can make of this pattern
    step: int  # distance between the two feasible neighbors around the target
    values: dict[str, int]  # what was set, e.g. {"E.d_expert": 1536} or {"d_model": 512}

    @property
    def residual(self) -> int:
        """Active parameters minus target; at most half a step either way."""
        return self.active_params - self.target


def match(
    arch: Arch,
    *,
    active_params: int,
    free: str | Sequence[str] = ("d_expert",),
    multiple: int = 8,
    ratio: Ratio = None,
    share: float | None = None,
) -> Arch:
    """Size the ``free`` fields, in multiples of ``multiple`` [channels], to ``active_params`` [count per token].

    ``free`` names widths: ``d_expert``, ``d_ff``, ``d_inner`` (or ``expand``), ``d_model``. Several move together at
    ``ratio`` (``{"d_inner": 2, "d_expert": 3}`` or in the order of ``free``; none: their present proportions). Slots
    that pin a field in ``{args}`` keep it; a field that no block here has is left out while another one moves.
    Of two equally near architectures the smaller is returned.

    ``share`` splits instead: the blocks that have the first free field get this part of the sized parameters (all but
    norms and blocks without a free field) and those that have one of the others the rest, e.g.
    ``free=("d_inner", "d_expert"), share=0.5``. The total is then as exact as without, the share as near as one
    multiple of the first field.

    Raises MatchError when nothing can move or the target lies outside what the free fields reach, ConfigError for a
    field or number that makes no sense.
    """
    return solve(arch, active_params=active_params, free=free, multiple=multiple, ratio=ratio, share=share).arch


def solve(
    arch: Arch,
    *,
    active_params: int,
    free: str | Sequence[str] = ("d_expert",),
    multiple: int = 8,
    ratio: Ratio = None,
    share: float | None = None,
) -> Match:
    """Do as :func:`match` and return how near it came, what is reachable, and the sizes that were set."""
    target, multiple, fields = _positive("active_params", active_params), _positive("multiple", multiple), _fields(free)
    if share is None:
        return _Line(arch, fields, multiple, ratio).solve(target)
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ConfigError(
            f"match share={share!r} must be a number between 0 and 1, the part of the blocks with {fields[0]}",
            field="share",
            got=share,
            allowed="between 0 and 1",
        )
    if len(fields) < 2 or ratio is not None:
        raise ConfigError(
            f"match share={share!r} needs two free fields or more and no ratio, got free={fields} and {ratio=}",
            field="free",
            got=fields,
        )
    lead, follow = _Line(arch, fields[:1], multiple, None), _Line(arch, fields[1:], multiple, None)
    if both := lead.owners & follow.owners:
        raise ConfigError(
            f"match cannot split active parameters inside one block: {', '.join(both)} has {fields[0]!r} too",
            field="free",
            got=fields,
        )
    fixed = lead.active(None) - lead.active(None, lead.owners) - follow.active(None, follow.owners)
    part = lead.solve(round(share * (target - fixed)), lead.owners)
    final = _Line(part.arch, fields[1:], multiple, None).solve(target)
    return Match(final.arch, target, final.active_params, final.reachable, final.step, {**part.values, **final.values})


class _Line:
    """The architectures that free fields reach, as a line of points k = 1, 2, ...: the widest size is k * multiple."""

    def __init__(self, arch: Arch, free: tuple[str, ...], multiple: int, ratio: Ratio) -> None:
        self.arch = arch
        self.free = free
        self.multiple = multiple
        self.given = {letter: dict(own) for letter, own in arch.blocks}
        # One entry per kind of slot: a motif of 118 layers is as quick as one of two.
        modules = {node.module: (node.slot.letter, node.slot.args) for node in arch.nodes}
        self.kinds = Counter(modules.values())
        self.uses = Counter((node.slot.letter, node.slot.args) for node in arch.nodes)
        self.owners = {letter for letter, _ in self.kinds if any(_has(letter, field) for field in free)}
        self.movers = self._movers()
        self.ratios = self._ratios(ratio)
        self._costs: dict[tuple[int, bool], int | None] = {}
        self.last = self._last()

    def _movers(self) -> dict[str, Any]:
        """Return what can move, ``letter.field`` (or d_model) -> present size, None where the block leaves it open.

        Raises MatchError for nothing.
        """
        sizes: dict[str, Any] = {}
        for field in self.free:
            if field == "d_model":
                sizes[field] = self.arch.d_model
                continue
            for node in self.arch.nodes:
                if _has(node.slot.letter, field) and not _pinned(node.slot.args, field):
                    sizes.setdefault(f"{node.slot.letter}.{field}", node.config.canonical().get(field))
        if not sizes:
            raise self._nothing_moves()
        return sizes

    def _nothing_moves(self) -> MatchError:
        where = f"pattern '{self.arch.pattern}'"
        letters = sorted({letter for letter, _ in self.kinds})
        others = [name for letter in letters for name in widths_of(letter) if name not in self.free]
        instead = f"free {others[0] if others else 'd_model'} instead"
        fields = " or ".join(self.free)
        if self.owners:
            pinned = ", ".join(sorted(self.owners))
            problem = (
                f"{where} sets {fields} of every {pinned} in its arguments, so that free={self.free} has nothing "
                f"to move; remove an argument or {instead}"
            )
        else:
            owners = [f"{x} {BLOCKS.get(x).name}" for x in BLOCKS if any(_has(x, field) for field in self.free)]
            problem = (
                f"{where} has no block with {fields} to size (that is {' or '.join(owners)}); add one or {instead}"
            )
        return MatchError(problem, field="free", got=self.free)

    def _ratios(self, ratio: Ratio) -> dict[str, Fraction]:
        """Return each mover's size as a fraction of the widest one."""
        sizes: dict[str, Any] = dict(self.movers) if len(self.movers) > 1 else dict.fromkeys(self.movers, 1)
        if ratio is not None:
            if not isinstance(ratio, Mapping):
                if len(ratio) != len(self.free):
                    raise ConfigError(
                        f"match {ratio=} needs one number for each of free={self.free}",
                        field="ratio",
                        got=ratio,
                        allowed=f"{len(self.free)} numbers",
                    )
                ratio = dict(zip(self.free, ratio, strict=True))
            named = {FACTORS.get(key, key): value for key, value in ratio.items()}
            for key in named:
                if key not in self.free:
                    raise ConfigError(
                        f"match ratio names {key!r}, which is not free{suggest(key, self.free)}",
                        field="ratio",
                        got=key,
                        allowed=self.free,
                    )
            sizes = {mover: named.get(mover.split(".")[-1]) for mover in self.movers}
        for mover, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size < float("inf"):
                hint = "" if ratio is not None else "; set it above 0 first or give a ratio"
                raise ConfigError(
                    f"match needs a ratio above 0 for {mover!r}, got {size!r}{hint}",
                    field="ratio",
                    got=size,
                    allowed="> 0",
                )
        widest = max(Fraction(size) for size in sizes.values())
        return {mover: Fraction(size) / widest for mover, size in sizes.items()}

    def _last(self) -> int:
        limits = [MAX_WIDTH]
        for mover, part in self.ratios.items():
            letter, _, field = mover.rpartition(".")
            bound = BLOCKS.get(letter).Config.__dataclass_fields__[field].metadata.get("le") if letter else None
            if bound is not None:
                limits.append(int(bound / part))
        return max(1, min(limits) // self.multiple)

    def sizes(self, k: int) -> dict[str, int]:
        """Return the size of every mover at point ``k``, halves rounded up, never less than one multiple."""
        return {m: self.multiple * max(1, (2 * k * r + 1).__floor__() // 2) for m, r in self.ratios.items()}

    def active(self, k: int | None, only: set[str] | None = None) -> int:
        """Return the active parameters at point ``k`` (None: as it is), of the letters in ``only`` or of the model.

        Raises ConfigError where a block refuses its sizes.
        """
        sizes = self.sizes(k) if k is not None else {}
        d_model = sizes.get("d_model", self.arch.d_model)
        total = 0
        if only is None:
            norms = self.arch.model.norm_params // self.arch.d_model * d_model
            total = norms * self.arch.n_norms
        given = self._fields_at(sizes)
        for (letter, args), count in self.kinds.items():
            if only is None or letter in only:
                values = overlay({"d_model": d_model, **given.get(letter, {})}, dict(args))
                params, canon_params = _counts(BLOCKS.get(letter).Config, values)
                total += count * params + self.uses[letter, args] * canon_params
        return total

    def _fields_at(self, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        given: dict[str, dict[str, Any]] = dict(self.given)
        for mover, size in sizes.items():
            letter, _, field = mover.rpartition(".")
            if letter:
                given[letter] = overlay(given.get(letter, {}), {field: size})
        return given

    def at(self, k: int) -> Arch:
        """Return the architecture at point ``k``."""
        sizes = self.sizes(k)
        model = {**self.arch.model.to_dict(), "d_model": sizes.get("d_model", self.arch.d_model)}
        return Arch.from_pattern(self.arch.pattern, **model, **self._fields_at(sizes))

    def cost(self, k: int, only: set[str] | None = None) -> int | None:
        """Return the active parameters at ``k``, or None where a block refuses its sizes."""
        key = (k, only is None)
        if key not in self._costs:
            try:
                self._costs[key] = self.active(k, only)
            except ConfigError:
                self._costs[key] = None
        return self._costs[key]

    def feasible(self, points: Iterator[int] | range, only: set[str] | None = None) -> int | None:
        """Return the first point that every block accepts, or None."""
        return next((k for k in points if self.cost(k, only) is not None), None)

    def solve(self, target: int, only: set[str] | None = None) -> Match:
        """Return the nearest feasible point; ``target`` counts the letters in ``only``, or the model."""
        low = self.feasible(range(1, min(self.last, _GAP) + 1), only)
        high = self.feasible(range(self.last, max(0, self.last - _GAP), -1), only)
        if low is None or high is None:
            self.active(1, only)  # raises the block's own reason
            raise MatchError(
                f"pattern '{self.arch.pattern}' accepts no size of free={self.free} in steps of {self.multiple}",
                field="multiple",
                got=self.multiple,
            )
        reachable = (self._known(low, only), self._known(high, only))
        if not reachable[0] <= target <= reachable[1]:
            raise MatchError(
                self._outside(target, reachable, only), field="active_params", got=target, allowed=reachable
            )
        while True:  # cost(low) <= target <= cost(high), both feasible
            middle = self.feasible(range((low + high) // 2, high), only)
            if middle is None or middle == low:
                middle = self.feasible(range((low + high) // 2, low, -1), only)
            if middle is None:
                break
            if self._known(middle, only) <= target:
                low = middle
            else:
                high = middle
        best = self._nearest(low, high, target, only)
        arch = self.at(best)
        step = self._known(high, only) - self._known(low, only)
        return Match(arch, target, self._known(best, only), reachable, step, self.sizes(best))

    def _nearest(self, low: int, high: int, target: int, only: set[str] | None) -> int:
        points = [low, high]
        if "d_model" in self.free and self._grouped():
            around = range(max(1, low - _WOBBLE), min(self.last, high + _WOBBLE) + 1)
            points += [k for k in around if self.cost(k, only) is not None]
        return min(points, key=lambda k: (abs(self._known(k, only) - target), self._known(k, only), k))

    def _grouped(self) -> bool:
        return any(getattr(node.config, "n_kv_heads", None) is not None for node in self.arch.nodes)

    def _known(self, k: int, only: set[str] | None) -> int:
        cost = self.cost(k, only)
        assert cost is not None
        return cost

    def _outside(self, target: int, reachable: tuple[int, int], only: set[str] | None) -> str:
        side = "below" if target < reachable[0] else "above"
        what = f"active_params={target:,}" + (f" for the share of {', '.join(sorted(only))}" if only else "")
        return (
            f"{what} lies {side} what free={self.free} can reach on pattern '{self.arch.pattern}': "
            f"{reachable[0]:,} to {reachable[1]:,}; change the target, or free other fields"
        )


def _counts(kind: type[BlockConfig], values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the active parameters of a block of these values, and those of its Canon layer; raises ConfigError.

    Remembered, because a search asks for the same blocks again and again: its candidates share letters and sizes.
    """
    key = (kind, *sorted((name, repr(value)) for name, value in values.items()))
    if key not in _COUNTS:
        if len(_COUNTS) >= _MOST_COUNTS:
            _COUNTS.clear()
        config = kind.from_dict(values, parse=True)
        _COUNTS[key] = (config.cost(1).active_params, config.canon_params)
    return _COUNTS[key]


def _fields(free: str | Sequence[str]) -> tuple[str, ...]:
    """Return the free fields, checked to be widths of known blocks, each once."""
    names = (free,) if isinstance(free, str) else tuple(free)
    fields = tuple(dict.fromkeys(FACTORS.get(name, name) for name in names))
    widths = {f for letter in BLOCKS for f in BLOCKS.get(letter).Config.field_names() if f.startswith("d_")}
    widths -= {"d_conv"}  # counts taps
    widths |= {name for letter in BLOCKS for name in (*widths_of(letter), *sizes_of(letter))}
    if not fields:
        raise ConfigError(
            f"match free=() needs at least one field; allowed: {', '.join(sorted(widths))}",
            field="free",
            got=names,
            allowed=tuple(sorted(widths)),
        )
    for field in fields:
        if field not in widths:
            raise ConfigError(
                f"match free={names} has no width {field!r}{suggest(str(field), widths)}",
                field="free",
                got=field,
                allowed=tuple(sorted(widths)),
            )
    return fields


def sizes_of(letter: str) -> tuple[str, ...]:
    """Return the further sizes that the block of a letter declares as sizable: for a pattern that has no width."""
    fields = dataclasses.fields(BLOCKS.get(letter).Config)
    return tuple(
        field.name for field in fields if field.metadata.get("sizable") and field.name not in widths_of(letter)
    )


def widths_of(letter: str) -> tuple[str, ...]:
    """Return the fields by which the block of a letter declares that it can be sized."""
    config = BLOCKS.get(letter).Config
    return tuple(name for name in config.widths if name in config.field_names())


def _has(letter: str, field: str) -> bool:
    return field != "d_model" and field in BLOCKS.get(letter).Config.field_names()


def _pinned(args: tuple[tuple[str, str], ...], field: str) -> bool:
    return any(FACTORS.get(key, key) == field for key, _ in args)


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"match {name}={value!r} must be a whole number of at least 1", field=name, got=value, allowed=">= 1"
        )
    return value
