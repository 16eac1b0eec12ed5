"""Where an architecture's parameters, FLOPs and state lie: rows for ``describe``, and the outline for drawings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.arch.pattern import Pattern
from hybridnas.cost import Cost
from hybridnas.registry import BLOCKS

_TOKEN = re.compile(r"\[[^\]]*\]|[A-Z](\{[^}]*\})?(@((?!x\d)[a-z0-9_])((?!x\d)[a-z0-9_])*)?|\(|\)|x\d+")


@dataclass(frozen=True)
class Motif:
    """A piece of a folded pattern: a layer (its first index and all), or a group, repeated ``times``."""

    layers: tuple[int, ...]  # every layer that this piece stands for, of all repeats
    times: int = 1
    parts: tuple[Motif, ...] = ()  # what a group repeats; empty: one layer

    def leaves(self) -> Iterator[Motif]:
        """Every single layer of the outline, top to bottom."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.leaves()


@dataclass(frozen=True)
class Row:
    """One line of the table: a block of one layer, or of all layers that a folded pattern writes with one letter."""

    layers: tuple[int, ...]  # indices; empty for embedding, norms and head
    letter: str  # "" for embedding, norms and head
    name: str
    sizes: str  # main sizes in words, e.g. "32 experts of 1,536"
    cost: Cost  # of all these layers together, so that the rows add up to the total

    @property
    def where(self) -> str:
        """The layers in few characters: ``3``, ``0-4``, or ``1, 3 .. 15 (8)``."""
        return _ranges(self.layers)


@dataclass(frozen=True)
class Table:
    """Rows in the order of execution, and their sum, which equals :meth:`Arch.cost`."""

    rows: tuple[Row, ...]
    total: Cost
    seq_len: int


def describe_layers(arch: Arch, seq_len: int = 1024, dtype_bytes: int = 4) -> Table:
    """Return what every layer of an architecture holds and costs; repeats of a folded pattern share a row."""
    seen: set[str] = set()
    embedding = arch.d_model * arch.vocab_size
    rows = [Row((), "", "embedding", f"{arch.vocab_size:,} tokens", Cost(embedding_params=embedding))]
    for leaf in (leaf for part in outline(arch.pattern) for leaf in part.leaves()):
        first = [node for branch in arch.layers[leaf.layers[0]] for node in branch]
        costs = [Cost() for _ in first]
        for layer in leaf.layers:
            for place, node in enumerate(node for branch in arch.layers[layer] for node in branch):
                cost = node.config.cost(seq_len, dtype_bytes)
                costs[place] += cost.without_params() if node.module in seen else cost
                seen.add(node.module)
        for node, cost in zip(first, costs, strict=True):
            rows.append(Row(leaf.layers, node.slot.letter, _name(arch, node), main_sizes(node), cost))
    count = len(arch.pattern) + arch.model.final_norm
    norms = arch.model.norm_params * count
    rows.append(Row((), "", "norms", f"{count} {arch.model.norm}", Cost(params=norms, active_params=norms)))
    head = Cost(embedding_params=0 if arch.model.tie_embeddings else embedding, flops_per_token=2.0 * embedding)
    rows.append(Row((), "", "head", "tied to the embedding" if arch.model.tie_embeddings else "", head))
    return Table(tuple(rows), sum((row.cost for row in rows), start=Cost()), seq_len)


def outline(pattern: Pattern) -> tuple[Motif, ...]:
    """Return the pattern as its canonical spelling folds it: layers and repeated groups, nested."""
    tokens = [match.group() for match in _TOKEN.finditer(str(pattern))]
    parts, _, _ = _outline(tokens, 0, 0)
    return parts


def _outline(tokens: list[str], at: int, layer: int) -> tuple[tuple[Motif, ...], int, int]:
    """Read tokens from ``at`` to the closing bracket; return the parts, the next token and the next layer."""
    parts: list[Motif] = []
    while at < len(tokens) and tokens[at] != ")":
        start = layer
        inner: tuple[Motif, ...] = ()
        if tokens[at] == "(":
            inner, at, layer = _outline(tokens, at + 1, layer)
        else:
            layer += 1
        at += 1
        times = 1
        if at < len(tokens) and tokens[at][0] == "x":
            times = int(tokens[at][1:])
            at += 1
        length = layer - start
        layer = start + length * times
        offsets = [start + length * turn - start for turn in range(times)]
        piece = Motif((start,), 1, inner) if not inner else Motif(tuple(range(start, start + length)), 1, inner)
        parts.append(replace(_spread(piece, offsets), times=times))
    return tuple(parts), at, layer


def _spread(piece: Motif, offsets: list[int]) -> Motif:
    layers = tuple(sorted(layer + offset for layer in piece.layers for offset in offsets))
    return replace(piece, layers=layers, parts=tuple(_spread(part, offsets) for part in piece.parts))


def main_sizes(node: Node) -> str:
    """Return the sizes by which a block is known, in words; other fields only where they are not the default."""
    config = node.config.canonical()
    said = {"d_model"}
    words = []
    if "n_experts" in config:
        chosen = f" top-{config['top_k']}" if config.get("top_k", 1) != 1 else ""
        words.append(f"{config['n_experts']} experts of {config['d_expert']:,}{chosen}")
        said |= {"n_experts", "d_expert", "top_k", "router"}
    if "n_heads" in config:
        heads, kv = config["n_heads"], config.get("n_kv_heads")
        words.append(f"{heads} heads of {config['head_dim']}" + (f", {kv} kv" if kv != heads else ""))
        said |= {"n_heads", "n_kv_heads", "head_dim"}
    for key in ("d_ff", "d_inner", "d_state"):
        if key in config:
            words.append(f"{key} {config[key]:,}")
            said.add(key)
    return ", ".join(words + _changed(node, said))


def _changed(node: Node, said: set[str]) -> list[str]:
    """Return ``key value`` for fields that differ from the block's default and are not said yet."""
    words = []
    for field in fields(node.config):
        value: Any = getattr(node.config, field.name)
        if field.name in said or field.name == "expand" or value == field.default:
            continue
        words.append(field.name if value is True else f"{field.name} {value}")
    if getattr(node.config, "router", "switch") == "expert_choice":
        words.append("expert choice")
    return words


def _name(arch: Arch, node: Node) -> str:
    name = BLOCKS.get(node.slot.letter).name
    if len(arch.layers[node.layer]) > 1:
        name += f", branch {node.branch + 1}"
    return f"{name} @{node.slot.share}" if node.slot.share else name


def _ranges(layers: tuple[int, ...]) -> str:
    if len(layers) < 2:
        return "".join(map(str, layers))
    steps = {right - left for left, right in itertools.pairwise(layers)}
    if steps == {1}:
        return f"{layers[0]}-{layers[-1]}"
    if len(steps) == 1 and len(layers) > 2:
        return f"{layers[0]}, {layers[1]} .. {layers[-1]} ({len(layers)})"
    if len(layers) <= 6:
        return ", ".join(map(str, layers))
    return f"{layers[0]}, {layers[1]}, {layers[2]} .. {layers[-1]} ({len(layers)})"
