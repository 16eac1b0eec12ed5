"""The layer graph: embedding, blocks, sums, head, as a networkx DiGraph: a view for analysis, and its validation.

The model itself is built from ``arch.layers``.

An edge is a tensor of one width that flows from one node to the next. Residual additions and norms belong to their
layer and are not drawn as edges: every layer reads ``norm(x)`` and adds its result to ``x``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from hybridnas.errors import GraphError

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch, Node

SOURCE, SINK = "embed", "head"


def arch_graph(arch: Arch) -> nx.DiGraph:
    """Return the validated graph of an architecture.

    Node attributes: ``kind`` (embed, block, sum or head), ``width``, and for blocks ``node`` (the resolved Node).
    """
    graph = nx.DiGraph(pattern=str(arch.pattern), fingerprint=arch.fingerprint())
    graph.add_node(SOURCE, kind="embed", width=arch.d_model)
    before = SOURCE
    for layer in arch.layers:
        ends = []
        for branch in layer:
            previous = before
            for node in branch:
                name = node_name(node, parallel=len(layer) > 1)
                graph.add_node(name, kind="block", width=node.config.d_model, node=node)
                graph.add_edge(previous, name)
                previous = name
            ends.append(previous)
        before = ends[0]
        if len(layer) > 1:
            before = f"{layer[0][0].layer} sum"
            graph.add_node(before, kind="sum", width=arch.d_model)
            graph.add_edges_from((end, before) for end in ends)
    graph.add_node(SINK, kind="head", width=arch.d_model)
    graph.add_edge(before, SINK)
    validate(graph)
    return graph


def node_name(node: Node, *, parallel: bool) -> str:
    """Return the graph's name of a block: ``3 M``, or ``3a M`` and ``3a.1 F`` inside a parallel layer."""
    place = str(node.layer)
    if parallel:
        place += "abcdefghijklmnopqrstuvwxyz"[node.branch % 26] + (f".{node.position}" if node.position else "")
    return f"{place} {node.slot.letter}"


def validate(graph: nx.DiGraph) -> None:
    """Raise GraphError unless the graph is acyclic, has one source and one sink, one width, and equal
    configs for shared modules.
    """
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(str(edge[0]) for edge in nx.find_cycle(graph))
        raise GraphError(f"layer graph has a cycle {cycle}; layers must be ordered from {SOURCE!r} to {SINK!r}")
    sources = [n for n in graph if graph.in_degree(n) == 0]
    sinks = [n for n in graph if graph.out_degree(n) == 0]
    if sources != [SOURCE] or sinks != [SINK]:
        raise GraphError(
            f"layer graph must run from {SOURCE!r} to {SINK!r} alone, got sources {sources} and sinks {sinks}; "
            f"connect or remove the loose nodes"
        )
    widths = {name: data["width"] for name, data in graph.nodes(data=True)}
    for left, right in graph.edges:
        if widths[left] != widths[right]:
            raise GraphError(
                f"layer graph edge {left!r} -> {right!r} joins width {widths[left]} to {widths[right]}; "
                f"the residual stream has one width"
            )
    owners: dict[str, Node] = {}
    for name, data in graph.nodes(data=True):
        if data["kind"] != "block":
            continue
        node = data["node"]
        owner = owners.setdefault(node.module, node)
        if owner.config != node.config:
            raise GraphError(f"layer graph node {name!r} shares {node.module!r} with a block of another config")
