"""Nodes by role: looked up by target where a role has one, and in the order of the graph."""

import itertools

import torch
from torch import fx, nn

from fxzero import torch_internals
from fxzero.graph.nodes import Role, role
from fxzero.graph.step import copy_of
from fxzero.passes import default_passes
from fxzero.planner import plan


def test_nodes_of_roles_are_those_of_a_walk_through_the_graph() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 8))
        step = plan(model, (torch.empty(4, 16),), world_size=2, passes=default_passes(bucket_bytes=1)).step
    nodes = list(step.graph.nodes)
    for pair in itertools.product(Role, repeat=2):
        assert step.nodes(*pair) == [node for node in nodes if role(node) in pair]
    assert all(step.nodes(each) for each in Role if each not in (Role.CONSTANT, Role.BUFFER, Role.STATE))


def test_plain_graph_has_the_nodes_and_names_of_any_graph() -> None:
    graphs = [fx.Graph(), torch_internals.PlainGraph()]
    for graph in graphs:
        x, y = graph.placeholder("x"), graph.placeholder("x")
        total = graph.call_function(torch.ops.aten.add.Tensor, (x, y), {"alpha": 2})
        with graph.inserting_before(total):
            first = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
        total.replace_input_with(x, first)
        graph.erase_node(graph.call_function(torch.relu, (total,)))
        graph.output((graph.create_node("call_function", torch.relu, (total,), name="add_1"),))
        graph.lint()
    assert str(graphs[0]) == str(graphs[1])
    assert [len(graph.nodes) for graph in graphs] == [6, 6]
    found = [graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor) for graph in graphs]
    assert [[node.name for node in nodes] for nodes in found] == [["add_tensor_1", "add_tensor"]] * 2


def test_copy_has_equal_nodes_and_meta_of_its_own() -> None:
    step = plan(nn.Linear(3, 2), torch.empty(4, 3), world_size=2).step
    copied = copy_of(step)
    assert str(copied.graph) == str(step.graph)
    copied.graph.lint()
    for node, other in zip(step.graph.nodes, copied.graph.nodes, strict=True):
        assert node.meta == other.meta and node.meta is not other.meta
