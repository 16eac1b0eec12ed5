"""The layer graph: its shape, and what validation refuses."""

import dataclasses

import networkx as nx
import pytest

from hybridnas.arch.arch import Arch
from hybridnas.arch.graph import arch_graph, plan, validate
from hybridnas.errors import GraphError


def small(pattern, **fields):
    return Arch.from_pattern(pattern, d_model=32, vocab_size=64, **fields)


def test_a_plain_pattern_is_a_chain_from_embedding_to_head():
    graph = arch_graph(small("ME"))
    assert list(graph.edges) == [("embed", "0 M"), ("0 M", "1 E"), ("1 E", "head")]
    assert {data["width"] for _, data in graph.nodes(data=True)} == {32}
    assert graph.graph["pattern"] == "ME"


def test_branches_of_a_parallel_layer_meet_in_a_sum():
    graph = arch_graph(small("M[MF,E]A"))
    assert set(graph.successors("0 M")) == {"1a E", "1b M"}
    assert list(graph.successors("1b M")) == ["1b.1 F"]
    assert set(graph.predecessors("1 sum")) == {"1a E", "1b.1 F"}
    assert list(graph.successors("1 sum")) == ["2 A"]


def test_shared_nodes_point_to_one_module():
    graph = arch_graph(small("A@sMA@s"))
    modules = [graph.nodes[name]["node"].module for name in ("0 A", "1 M", "2 A")]
    assert modules[0] == modules[2] == "shared.s"
    assert modules[1] != modules[0]


@pytest.mark.parametrize("text", ["(ME)x8", "M[MF,E]A", "A@sM[A@s,E]x2", "Mx30"])
def test_the_plan_read_off_the_graph_is_the_architecture(text):
    arch = small(text)
    assert [layer.branches for layer in plan(arch_graph(arch))] == list(arch.layers)


def test_a_cycle_is_refused():
    graph = arch_graph(small("MEA"))
    graph.add_edge("2 A", "0 M")
    with pytest.raises(GraphError, match=r"has a cycle .*; layers must be ordered from 'embed' to 'head'"):
        validate(graph)


def test_a_loose_node_is_refused():
    graph = arch_graph(small("ME"))
    graph.add_node("loose", kind="sum", width=32)
    with pytest.raises(GraphError, match=r"got sources \['embed', 'loose'\] and sinks \['head', 'loose'\]"):
        validate(graph)


def test_two_widths_are_refused():
    graph = arch_graph(small("ME"))
    graph.nodes["1 E"]["width"] = 48
    with pytest.raises(GraphError, match="edge '0 M' -> '1 E' joins width 32 to 48; the residual stream has one width"):
        validate(graph)


def test_sharing_between_different_configs_is_refused():
    graph = arch_graph(small("A@sMA@s"))
    node = graph.nodes["2 A"]["node"]
    graph.nodes["2 A"]["node"] = dataclasses.replace(node, config=node.config.replace(bias=True))
    with pytest.raises(GraphError, match=r"'2 A' shares 'shared\.s' with a block of another config"):
        validate(graph)


def test_the_graph_is_a_networkx_graph_that_others_can_walk():
    assert nx.dag_longest_path_length(arch_graph(small("(ME)x4"))) == 9
