"""Where an architecture's parameters, FLOPs and state lie, one row for each letter of its folded pattern."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields
from typing import Any

from hybridnas.arch.arch import Arch, Node
from hybridnas.cost import Cost
from hybridnas.registry import BLOCKS


@dataclass(frozen=True)
class Row:
    """One line of the table: a block of one layer, or of all layers that a folded pattern writes with one letter."""

    layers: tuple[int, ...]  # indices; empty for embedding, norms and head
    letter: str  # "" for embedding, norms and head
    name: str
    sizes: str  # main sizes, e.g. "32 experts of 1,536"
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
    if arch.model.n_meta_tokens:
        meta = arch.model.n_meta_tokens
        rows.append(Row((), "", "meta tokens", f"{meta:,} tokens", Cost(embedding_params=meta * arch.d_model)))
    for leaf in arch.pattern.motif.leaves():
        first = [node for branch in arch.layers[leaf.layers[0]] for node in branch]
        costs = [Cost() for _ in first]
        for layer in leaf.layers:
            for place, node in enumerate(node for branch in arch.layers[layer] for node in branch):
                costs[place] += arch.node_cost(node, seq_len, dtype_bytes, first_use=node.module not in seen)
                seen.add(node.module)
        for node, cost in zip(first, costs, strict=True):
            rows.append(Row(leaf.layers, node.slot.letter, _name(arch, node), main_sizes(node), cost))
    norms = arch.model.norm_params * arch.n_norms
    rows.append(Row((), "", "norms", f"{arch.n_norms} {arch.model.norm}", Cost(params=norms, active_params=norms)))
    head = Cost(embedding_params=0 if arch.model.tie_embeddings else embedding, flops_per_token=2.0 * embedding)
    rows.append(
        Row(
            (),
            "",
            "head",
            "tied to the embedding" if arch.model.tie_embeddings else f"{arch.vocab_size:,} tokens",
            head,
        )
    )
    return Table(tuple(rows), sum((row.cost for row in rows), start=Cost()), seq_len)


def main_sizes(node: Node) -> str:
    """Return the sizes by which a block is known; other fields only where they are not the default."""
    config = node.config.canonical()
    shown = {"d_model"}
    parts = []
    if "n_experts" in config:
        chosen = f" top-{config['top_k']}" if config.get("top_k", 1) != 1 else ""
        noun = "expert" if config["n_experts"] == 1 else "experts"
        parts.append(f"{config['n_experts']} {noun} of {config['d_expert']:,}{chosen}")
        shown |= {"n_experts", "d_expert", "top_k", "router"}
    if "n_heads" in config:
        heads, kv = config["n_heads"], config.get("n_kv_heads")
        parts.append(
            f"{heads} {'head' if heads == 1 else 'heads'} of {config['head_dim']}"
            + (f", {kv} kv" if kv not in (None, heads) else "")
        )
        shown |= {"n_heads", "n_kv_heads", "head_dim"}
    for key in ("window", "d_ff", "d_inner", "d_state"):
        if config.get(key) is not None:
            parts.append(f"{key} {config[key]:,}")
            shown.add(key)
    return ", ".join(parts + _changed(node, shown))


def _changed(node: Node, shown: set[str]) -> list[str]:
    """Return ``key value`` for fields that differ from the block's default and are not shown yet."""
    parts = []
    for field in fields(node.config):
        value: Any = getattr(node.config, field.name)
        if field.name in shown or field.name == "expand" or value == field.default:
            continue
        parts.append(field.name if value is True else f"{field.name} {value}")
    if getattr(node.config, "router", "switch") == "expert_choice":
        parts.append("expert choice")
    return parts


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
