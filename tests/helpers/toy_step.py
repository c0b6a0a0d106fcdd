"""A hand-made step: a chain of linear layers, forward and backward, for tests of passes and the verifier."""

from typing import Any

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.layout import ParamSpec
from fxzero.graph.nodes import META_KEY, NodeInfo, Role
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph

aten = torch.ops.aten


def toy_step(
    num_layers: int = 3, width: int = 64, world_size: int = 8, backward: bool = True, frozen: int = -1
) -> StepGraph:
    """`num_layers` layers `x @ w.t()`; each weight has `width * width * 4` bytes."""
    graph = fx.Graph()

    def placeholder(name: str, role: Role, fqn: str, *shape: int) -> fx.Node:
        node = graph.placeholder(name)
        node.meta = {META_KEY: NodeInfo(role, fqn), "val": torch.empty(shape, device="meta")}
        return node

    def compute(op: Any, fqn: str, *args: fx.Node) -> fx.Node:
        node = graph.call_function(op, args)
        node.meta = {META_KEY: NodeInfo(Role.COMPUTE, fqn), "val": op(*[arg.meta["val"] for arg in args])}
        return node

    names = [f"layers.{index}" for index in range(num_layers)]
    weights = [placeholder(f"w{i}", Role.PARAM, f"{name}.w", width, width) for i, name in enumerate(names)]
    hidden = placeholder("x", Role.INPUT, "x", 4, width)
    tangent = placeholder("tangent", Role.TANGENT, "", 4, width) if backward else None
    saved: list[tuple[fx.Node, fx.Node]] = []
    for name, weight in zip(names, weights, strict=True):
        transposed = compute(aten.t.default, name, weight)
        saved.append((hidden, transposed))
        hidden = compute(aten.mm.default, name, hidden, transposed)
    grads: dict[str, fx.Node] = {}
    grad = tangent
    if grad is not None:
        graph.call_function(ops.end_forward)
        for index in reversed(range(num_layers)):
            before, transposed = saved[index]
            if index != frozen:
                over = compute(aten.t.default, names[index], grad)
                grads[f"{names[index]}.w"] = compute(aten.mm.default, names[index], over, before)
            if index > 0:
                grad = compute(aten.mm.default, names[index], grad, compute(aten.t.default, names[index], transposed))
    graph.output(())
    params = {
        f"{name}.w": ParamSpec(f"{name}.w", (width, width), torch.float32, index != frozen)
        for index, name in enumerate(names)
    }
    step = StepGraph(graph, params, Sharding.over(world_size))
    step.set_output([hidden], grads, [None])
    return step
