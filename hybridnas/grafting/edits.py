"""What a graft changes: edits as text, or a whole target pattern, resolved to where every block comes from.

::

    edits    := edit (";" edit)*
    edit     := N ":" [LAYER] "->" LAYER     3:A->G     replace layer 3 (the old layer, where given, is checked)
              | N "{" KEY "=" VALUE ... "}"  3{d_ff=96} other settings for layer 3: wider, more experts, a window
              | "+" N ":" LAYER+             +2:F       insert before layer 2; at the end where N is the depth
              | "-" N                        -4         delete layer 4
              | N "<->" N                    1<->3      swap two layers
              | N ">>" N                     5>>2       move layer 5 to the place of layer 2
              | N "|" N                      2|3        make one parallel layer of both: [A,F]

All numbers are of the layers of the model as it is given, counted from 0, whatever else the same text changes. A target
pattern is aligned with the model's own by the fewest inserts, deletions and replacements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.pattern import Layer, Parallel, Pattern, Slot, parse
from hybridnas.errors import ConfigError, PatternError
from hybridnas.registry import BLOCKS

GRAMMAR = "3:A->G, 3{d_ff=96}, +2:F, -4, 1<->3, 5>>2, 2|3, joined by ';', or a whole pattern"
Place = tuple[int, int, int]  # layer, branch, position in the branch

_FORMS = (
    ("replace", re.compile(r"(?:replace\s+)?(\d+)\s*:\s*(.*?)\s*->\s*(.+)", re.DOTALL)),
    ("set", re.compile(r"(\d+)\s*(\{.*\})", re.DOTALL)),
    ("insert", re.compile(r"(?:\+|insert\s+)\s*(\d+)\s*:\s*(.+)", re.DOTALL)),
    ("delete", re.compile(r"(?:-|delete\s+)\s*(\d+)")),
    ("swap", re.compile(r"(\d+)\s*<->\s*(\d+)|swap\s+(\d+)\s*,\s*(\d+)")),
    ("move", re.compile(r"(\d+)\s*>>\s*(\d+)")),
    ("parallel", re.compile(r"(\d+)\s*\|\s*(\d+)")),
)


@dataclass(frozen=True)
class Part:
    """One block of the result: the block of the model that it comes from, None for one that is inserted."""

    node: Node
    origin: Node | None
    renewed: bool = False  # the edit replaces it, so that it starts anew even where its settings are the old ones

    @property
    def kept(self) -> bool:
        """Whether the block goes on with its weights: the same block with the same settings."""
        return self.origin is not None and not self.renewed and _same(self.node, self.origin)


@dataclass(frozen=True)
class Plan:
    """The architecture after the edits, and for each of its layers what it is made of."""

    arch: Arch
    edits: tuple[str, ...]
    layers: tuple[tuple[Part, ...], ...]
    origins: tuple[tuple[int, ...], ...]  # for each layer the layers of the model that it stands for; several: parallel

    @property
    def parts(self) -> list[Part]:
        """The blocks of the result in the order of execution."""
        return [part for layer in self.layers for part in layer]


@dataclass
class _Item:
    """A layer on the way from the old pattern to the new one."""

    layer: Layer
    sources: tuple[tuple[Place | None, ...], ...]  # for each branch and position
    origins: tuple[int, ...] = ()
    renewed: bool = False
    deleted: bool = False
    added: list[_Item] = field(default_factory=list)  # inserted before this one


def plan(arch: Arch, change: str | Pattern | Arch, fields: Mapping[str, Any] | None = None) -> Plan:
    """Resolve edits, a target pattern or a target architecture against ``arch``.

    ``fields``: settings of the new blocks, as :meth:`Arch.from_pattern` takes them (``G={"head_dim": 16}``).
    Raises PatternError for text that is neither, ConfigError for a layer that is not there or a width of the residual
    stream that differs.
    """
    if isinstance(change, str) and (edits := _split(change)) is not None:
        items, target = _edited(arch, edits), None
        words = tuple(edits)
    else:
        target = change if isinstance(change, Arch) else None
        pattern = change.pattern if isinstance(change, Arch) else _pattern(change)
        items, words = _aligned(arch, pattern, target, fields or {})
    if not items:
        raise ConfigError(
            f"graft edit={change!r} leaves no layer of '{arch.pattern}'; keep at least one",
            field="edit",
            got=str(change),
            allowed="at least one layer",
        )
    pattern, ordered = _spelled(items)
    if target is None:
        target = arch.replace(pattern=pattern, **_fields(arch, pattern, fields or {}))
    _check_around(arch, target)
    nodes = {(node.layer, node.branch, node.position): node for node in arch.nodes}
    layers = []
    for item, branches in zip(ordered, target.layers, strict=True):
        found = []
        for branch, sources in zip(branches, item.sources, strict=True):
            for node, source in zip(branch, sources, strict=True):
                found.append(Part(node, None if source is None else nodes[source], item.renewed))
        layers.append(tuple(found))
    return Plan(target, words, tuple(layers), tuple(item.origins for item in ordered))


def _fields(arch: Arch, pattern: Pattern, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of new blocks: what is given, over those that a letter's like has in the model (S: of A)."""
    own, known = dict(arch.blocks), {slot.letter for slot in arch.pattern.slots}
    found: dict[str, Any] = {}
    for letter in sorted({slot.letter for slot in pattern.slots} - known):
        kind = BLOCKS.get(letter).same_as or letter
        likes = [other for other in own if (BLOCKS.get(other).same_as or other) == kind]
        if likes:
            names = BLOCKS.get(letter).Config.field_names()
            found[letter] = {name: value for name, value in own[likes[0]] if name in names}
    for key, value in given.items():
        found[key] = {**found[key], **value} if key in found and isinstance(value, Mapping) else value
    return found


def _split(text: str) -> list[str] | None:
    """Return the edits of a text, None where it is a pattern; raises PatternError for a part that is neither."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    known = [any(form.fullmatch(part) for _, form in _FORMS) for part in parts]
    if parts and all(known):
        return parts
    if parts and (any(known) or len(parts) > 1 or re.match(r"[\d+]|-\s*\d|[a-z]", parts[0])):
        wrong = parts[known.index(False)]
        raise PatternError(
            f"graft edit {wrong!r} is no edit; write {GRAMMAR}", field="edit", got=wrong, allowed=GRAMMAR
        )
    return None


def _pattern(change: str | Pattern) -> Pattern:
    return change if isinstance(change, Pattern) else parse(change)


def _edited(arch: Arch, edits: Sequence[str]) -> list[_Item]:
    """Return the items after all edits, each of whose numbers is one of the given model's layers."""
    items = [_own(arch, index) for index in range(len(arch.pattern))]
    order = [*items, _Item(items[-1].layer, (), deleted=True)]  # what is inserted at the end stands before the last
    touched: dict[int, str] = {}

    def at(text: str, edit: str, *, end: bool = False, once: bool = True) -> _Item:
        index, depth = int(text), len(items)
        if index >= depth + end:
            raise ConfigError(
                f"graft edit {edit!r} names layer {index}, but '{arch.pattern}' has layers 0 to {depth - 1}"
                + (f"; +{depth}: adds one at the end" if end else ""),
                field="edit",
                got=edit,
                allowed=f"0 to {depth - 1 + end}",
            )
        if once and index in touched:
            raise ConfigError(
                f"graft edit {edit!r} changes layer {index}, which {touched[index]!r} changes too; write one of them",
                field="edit",
                got=edit,
                allowed="one edit a layer",
            )
        if once:
            touched[index] = edit
        return order[-1] if index == depth else items[index]

    for edit in edits:
        kind, groups = next((k, m.groups()) for k, form in _FORMS if (m := form.fullmatch(edit)))
        first, second, *more = [group for group in groups if group is not None] + [""]
        if kind == "replace":
            item, new = at(first, edit), _one_layer(more[0], edit)
            if second and not _spells(second, item.layer):
                raise ConfigError(
                    f"graft edit {edit!r}: layer {first} of '{arch.pattern}' is {item.layer}, not {second}",
                    field="edit",
                    got=second,
                    allowed=str(item.layer),
                )
            items[int(first)].sources = _matched(item, new)
            item.renewed = isinstance(new, Slot) and isinstance(item.layer, Slot)
            item.layer = new
        elif kind == "set":
            item = at(first, edit)
            if isinstance(item.layer, Parallel):
                raise ConfigError(
                    f"graft edit {edit!r}: layer {first} is parallel; write the whole layer, {first}:->[...]",
                    field="edit",
                    got=edit,
                    allowed=f"{first}:->LAYER",
                )
            given = parse(item.layer.letter + second).slots[0]
            args = {**dict(item.layer.args), **dict(given.args)}
            item.layer = Slot(item.layer.letter, tuple(sorted(args.items())), item.layer.share)
        elif kind == "insert":
            before = at(first, edit, end=True, once=False)
            for layer in _layers(second, edit):
                before.added.append(_Item(layer, _blank(layer)))
        elif kind == "delete":
            at(first, edit).deleted = True
        else:
            one, two = at(first, edit), at(second, edit)
            if one is two:
                raise ConfigError(
                    f"graft edit {edit!r} names one layer twice", field="edit", got=edit, allowed="two layers"
                )
            if kind == "swap":
                i, j = order.index(one), order.index(two)
                order[i], order[j] = order[j], order[i]
                one.added, two.added = two.added, one.added  # inserted layers stay where they were put
            elif kind == "move":
                order.remove(one)
                order.insert(order.index(two) + (int(first) < int(second)), one)
            else:
                _join(one, two, edit)
    return [item for place in order for item in (*place.added, *([] if place.deleted else [place]))]


def _aligned(
    arch: Arch, pattern: Pattern, target: Arch | None, fields: Mapping[str, Any]
) -> tuple[list[_Item], tuple[str, ...]]:
    """Return the items of the cheapest way from one pattern to the other, and the edits that it is made of.

    An insert and a deletion cost 1, a replacement 1, 1.5 where a mixer becomes a feed-forward layer or the reverse, and
    0.5 where only the settings change. Of equal ways the one with the earliest replacements is taken.
    """
    resolved = target if target is not None else arch.replace(pattern=pattern, **_fields(arch, pattern, fields))
    old, new = arch.layers, resolved.layers
    cost = [[float(i + j) for j in range(len(new) + 1)] for i in range(len(old) + 1)]
    for i in range(1, len(old) + 1):
        for j in range(1, len(new) + 1):
            swapped = cost[i - 1][j - 1] + _distance(old[i - 1], new[j - 1])
            cost[i][j] = min(swapped, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    items: list[_Item] = []
    words: list[str] = []
    i, j = len(old), len(new)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + (far := _distance(old[i - 1], new[j - 1])):
            i, j = i - 1, j - 1
            item = _own(arch, i)
            layer = resolved.pattern.layers[j]
            if far:
                item.sources = _matched(item, layer)
                words.append(f"{i}:{item.layer}->{layer}")
            item.layer = layer
            items.append(item)
        elif j and cost[i][j] == cost[i][j - 1] + 1:
            j -= 1
            layer = resolved.pattern.layers[j]
            items.append(_Item(layer, _blank(layer)))
            words.append(f"+{i}:{layer}")
        else:
            i -= 1
            words.append(f"-{i}")
    return items[::-1], tuple(words[::-1])


def _distance(old: tuple[tuple[Node, ...], ...], new: tuple[tuple[Node, ...], ...]) -> float:
    ours, theirs = ([list(branch) for branch in layer] for layer in (old, new))
    if [len(b) for b in ours] == [len(b) for b in theirs]:
        pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        if all(_same(a, b) for a, b in pairs):
            return 0.0
        if all(_kind(a) == _kind(b) for a, b in pairs):
            return 0.5
    roles = [{BLOCKS.get(node.slot.letter).role for branch in layer for node in branch} for layer in (ours, theirs)]
    both = [{"feed_forward" if role == "feed_forward" else "mixer" for role in found} for found in roles]
    return 1.0 if both[0] & both[1] else 1.5


def _same(one: Node, other: Node) -> bool:
    """Whether two nodes are the same block with the same settings, at the same shared name."""
    return one.slot.share == other.slot.share and _kind(one) == _kind(other) and _settings(one) == _settings(other)


def _settings(node: Node) -> dict[str, Any]:
    from hybridnas.layers.block import AROUND

    return {**node.config.canonical(), **{name: getattr(node.config, name) for name in AROUND}}


def _kind(node: Node) -> str:
    return BLOCKS.get(node.slot.letter).same_as or node.slot.letter


def _own(arch: Arch, index: int) -> _Item:
    layer = arch.pattern.layers[index]
    places = tuple(
        tuple((index, b, position) for position, _ in enumerate(branch)) for b, branch in enumerate(arch.layers[index])
    )
    return _Item(layer, places, (index,))


def _branches(layer: Layer) -> tuple[tuple[Slot, ...], ...]:
    return layer.branches if isinstance(layer, Parallel) else ((layer,),)


def _blank(layer: Layer) -> tuple[tuple[Place | None, ...], ...]:
    return tuple(tuple(None for _ in branch) for branch in _branches(layer))


def _matched(item: _Item, new: Layer) -> tuple[tuple[Place | None, ...], ...]:
    """Give each block of a layer's replacement the old block of its letter, else the next one that is left."""
    old = list(
        zip((slot for b in _branches(item.layer) for slot in b), (p for b in item.sources for p in b), strict=True)
    )
    slots = [slot for branch in _branches(new) for slot in branch]
    found: list[Place | None] = [None] * len(slots)
    for exact in (True, False):
        for number, slot in enumerate(slots):
            if found[number] is None:
                at = next((i for i, (own, _) in enumerate(old) if not exact or _letter(own) == _letter(slot)), None)
                if at is not None:
                    found[number] = old.pop(at)[1]
    places = iter(found)
    return tuple(tuple(next(places) for _ in branch) for branch in _branches(new))


def _letter(slot: Slot) -> str:
    return BLOCKS.get(slot.letter).same_as or slot.letter


def _join(one: _Item, two: _Item, edit: str) -> None:
    """Make one parallel layer of two, at the place of the first."""
    branches = (*_branches(one.layer), *_branches(two.layer))
    sources = (*one.sources, *two.sources)
    one.layer, one.sources, one.origins = Parallel(branches), sources, one.origins + two.origins
    one.added += two.added
    two.added, two.deleted = [], True


def _spelled(items: Sequence[_Item]) -> tuple[Pattern, list[_Item]]:
    """Return the pattern of the items, and the items with the branches of parallel layers in its order."""
    for item in items:
        if isinstance(item.layer, Parallel):
            pairs = sorted(zip(item.layer.branches, item.sources, strict=True), key=lambda pair: str(pair[0]))
            item.layer = Parallel(tuple(branch for branch, _ in pairs))
            item.sources = tuple(sources for _, sources in pairs)
    return parse("".join(map(str, (item.layer for item in items)))), list(items)


def _layers(text: str, edit: str) -> tuple[Layer, ...]:
    try:
        return parse(text).layers
    except PatternError as error:
        raise PatternError(
            f"graft edit {edit!r}: {error}", field="edit", got=edit, allowed=error.allowed or GRAMMAR
        ) from None


def _one_layer(text: str, edit: str) -> Layer:
    layers = _layers(text, edit)
    if len(layers) != 1:
        raise PatternError(
            f"graft edit {edit!r} puts {len(layers)} layers in the place of one; write one, and +N:LAYERS for more",
            field="edit",
            got=text,
            allowed="one layer",
        )
    return layers[0]


def _spells(text: str, layer: Layer) -> bool:
    """Whether a text names a layer: by its letters, or with all its arguments."""
    named = parse(text)
    return str(named) == str(layer) or named.letters == Pattern((layer,)).letters


def _check_around(arch: Arch, target: Arch) -> None:
    """Raise ConfigError where something around the blocks differs, which no edit of layers changes."""
    for name, value in arch.model.to_dict().items():
        got = getattr(target.model, name)
        if got != value:
            raise ConfigError(
                f"graft changes layers, and {name}={got} differs from the model's {name}={value}"
                + ("; a wider model grows with train grow=DIR" if name == "d_model" else ""),
                field=name,
                got=got,
                allowed=value,
            )
