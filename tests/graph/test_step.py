"""Nodes by role: looked up by target where a role has one, and in the order of the graph."""

import itertools

import torch
from torch import nn

from fxzero.graph.nodes import Role, role
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
