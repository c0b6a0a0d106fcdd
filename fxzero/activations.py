"""Where a step's activations live: from the operator that makes them to their last reader, through all views.

    relu = relu(mm)          forward hands `relu` to backward: it is saved, and lives until backward has read it
    del mm                   nothing reads `mm` any more: it was temporary
    --- end of forward ---
    d = threshold_backward(tangent, relu)

They are not placed: the allocator finds room for them. What they need is known ahead of time all the same, operator by
operator, since the generated code drops each value after its last reader.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import cast

from torch import fx

from fxzero.codegen import static_nodes
from fxzero.ir import Phase, Role, StepGraph, info, is_view, memory_of, role, tensor_bytes
from fxzero.memory import Buffer


def activation_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The memory that compute nodes allocate, by the node that does.

    Kind "saved" if backward reads what forward made, else "temporary". Outputs count until the phase that returns them
    ends; how long the caller keeps them is not known. What operators allocate inside is not counted.
    """
    at, phase_of, static = step.positions(), step.phase_of(), set(static_nodes(step))
    until = _ends(step, at)
    buffers: dict[fx.Node, Buffer] = {}
    for node in _allocating(step):
        nbytes = tensor_bytes(node.meta.get("val"))
        if node in static or not nbytes:
            continue
        boundary = step.end_forward
        saved = boundary is not None and phase_of[node] is Phase.FORWARD and until.get(node, 0) > at[boundary]
        start = at[_allocated_at(node)]
        buffers[node] = Buffer("saved" if saved else "temporary", info(node).fqn, nbytes, start, until.get(node, start))
    return buffers


def _allocating(step: StepGraph) -> Iterator[fx.Node]:
    """Compute nodes that stand for memory of their own."""
    return (node for node in step.nodes(Role.COMPUTE) if memory_of(node) is node)


def _allocated_at(node: fx.Node) -> fx.Node:
    """The operator that runs: one of several outputs is allocated with the others."""
    return cast(fx.Node, node.args[0]) if node.target is operator.getitem else node


def _ends(step: StepGraph, at: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The last position at which the memory of each node is held by some variable of the generated code."""
    ends: dict[fx.Node, int] = {}
    for node in step.graph.nodes:
        if node.op == "output":
            continue
        for source in node.all_input_nodes:
            held = source if node.target is operator.getitem and not is_view(source) else memory_of(source)
            ends[held] = max(ends.get(held, 0), at[node])
    for values, end in ((step.model_outputs, step.end_forward or step.output), (step.input_grads, step.output)):
        for value in values:
            if isinstance(value, fx.Node):
                memory = memory_of(value)
                ends[memory] = max(ends.get(memory, 0), at[end])
    # The tuple of several outputs holds them all until its last is taken.
    for node in step.graph.nodes:
        if node.target is operator.getitem and role(node) is Role.COMPUTE and memory_of(node) is node:
            ends[node] = max(ends.get(node, 0), ends.get(cast(fx.Node, node.args[0]), 0))
    return ends
