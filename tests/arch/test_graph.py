"""The layer graph: its shape, and what validation refuses."""

import dataclasses

import networkx as nx
import pytest

from hybridnas.arch.arch import Arch
from hybridnas.arch.graph import validate
from hybridnas.errors import GraphError


def small(pattern, **fields):
    return Arch.from_pattern(pattern, d_model=32, vocab_size=64, **fields)


def test_a_plain_pattern_is_a_chain_from_embedding_to_head():
    graph = small("ME").graph()
    assert list(graph.edges) == [("embed", "0 M"), ("0 M", "1 E"), ("1 E", "head")]
    assert {data["width"] for _, data in graph.nodes(data=True)} == {32}
    assert graph.graph["pattern"] == "ME"


def test_branches_of_a_parallel_layer_meet_in_a_sum():
    graph = small("M[MF,E]A").graph()
    assert set(graph.successors("0 M")) == {"1a E", "1b M"}
    assert list(graph.successors("1b M")) == ["1b.1 F"]
    assert set(graph.predecessors("1 sum")) == {"1a E", "1b.1 F"}
    assert list(graph.successors("1 sum")) == ["2 A"]


def test_shared_nodes_point_to_one_module():
    graph = small("A@sMA@s").graph()
    modules = [graph.nodes[name]["node"].module for name in ("0 A", "1 M", "2 A")]
    assert modules[0] == modules[2] == "shared.s"
    assert modules[1] != modules[0]


@pytest.mark.parametrize("text", ["(ME)x8", "M[MF,E]A", "A@sM[A@s,E]x2", "Mx30"])
def test_walking_the_graph_gives_the_layers_of_the_architecture(text):
    arch = small(text)
    nodes = [data["node"] for _, data in arch.graph().nodes(data=True) if data["kind"] == "block"]
    assert nodes == list(arch.nodes)
    order = list(nx.topological_sort(arch.graph()))
    assert [order[0], order[-1]] == ["embed", "head"]


def test_a_cycle_is_refused():
    graph = small("MEA").graph()
    graph.add_edge("2 A", "0 M")
    with pytest.raises(GraphError, match=r"has a cycle .*; layers must be ordered from 'embed' to 'head'"):
        validate(graph)


def test_a_loose_node_is_refused():
    graph = small("ME").graph()
    graph.add_node("loose", kind="sum", width=32)
    with pytest.raises(GraphError, match=r"got sources \['embed', 'loose'\] and sinks \['head', 'loose'\]"):
        validate(graph)


def test_two_widths_are_refused():
    graph = small("ME").graph()
    graph.nodes["1 E"]["width"] = 48
    with pytest.raises(GraphError, match="edge '0 M' -> '1 E' joins width 32 to 48; the residual stream has one width"):
        validate(graph)


def test_sharing_between_different_configs_is_refused():
    graph = small("A@sMA@s").graph()
    node = graph.nodes["2 A"]["node"]
    graph.nodes["2 A"]["node"] = dataclasses.replace(node, config=node.config.replace(bias=True))
    with pytest.raises(GraphError, match=r"'2 A' shares 'shared\.s' with a block of another config"):
        validate(graph)


def test_the_graph_is_a_networkx_graph_that_others_can_walk():
    assert nx.dag_longest_path_length(small("(ME)x4").graph()) == 9
