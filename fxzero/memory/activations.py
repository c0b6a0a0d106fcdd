"""Where a step's activations live: from the operator that makes them to their last reader, through all views.

    relu = relu(mm)          forward hands `relu` to backward: it is saved, and lives until backward has read it
    del mm                   nothing reads `mm` any more: it was temporary
    --- end of forward ---
    d = threshold_backward(tangent, relu)

What they need is known ahead of time, operator by operator, since the generated code drops each value after its last
reader. On the CPU, temporary ones that an operator can write into given memory have places in the arena, so that a step
neither asks the allocator for them nor fragments it; saved ones are the allocator's, since a second forward may come
before the backward of the first.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from fxzero import torch_internals
from fxzero.graph.aliasing import is_view, memories, memory_of
from fxzero.graph.nodes import Role, info, is_gathered_param, is_island, read_until, role, tensor_bytes
from fxzero.graph.regions import is_region, region_of
from fxzero.graph.step import Phase, StepGraph
from fxzero.memory.inside_regions import inside_bytes
from fxzero.memory.lifetimes import Buffer, Kind


def static_nodes(step: StepGraph) -> list[fx.Node]:
    """Constants, gathered parameters, gradient slots, and everything that is only a view of those, in order."""
    static: dict[fx.Node, None] = {}
    views: dict[int, bool] = {}  # by the ids of operators, whose own hashes take longer
    for node in step.graph.nodes:
        is_a_view = views.get(id(node.target))
        if is_a_view is None:
            is_a_view = views[id(node.target)] = node.target is operator.getitem or is_view(node)
        if is_a_view:
            sources = torch_internals.input_nodes(node)
            is_static = (bool(sources) and all(source in static for source in sources)) or is_gathered_param(node)
        else:
            is_static = role(node) in (Role.CONSTANT, Role.GRAD_SLOT)
        if is_static:
            static[node] = None
    return list(static)


PLACED_FROM_BYTES = 64 * 1024
"""Smaller temporaries stay the allocator's, which has them at hand."""


@dataclass(frozen=True)
class PlacedTemporary:
    """A temporary activation with a place in the arena."""

    buffer: Buffer
    variant: tuple[Any, str]
    """The operator that writes it, and the name of its argument for where to."""


@dataclass(frozen=True)
class Activations:
    """The memory that the compute nodes of a step allocate."""

    buffers: Mapping[fx.Node, Buffer]
    """The memory of each node that allocates some."""
    placed: Mapping[fx.Node, PlacedTemporary]
    """Those of them that have places in the arena instead."""

    @property
    def of_allocator(self) -> tuple[Buffer, ...]:
        """The memory that the allocator is asked for."""
        return tuple(buffer for node, buffer in self.buffers.items() if node not in self.placed)


def activations_of(step: StepGraph) -> Activations:
    """What the operators of a step allocate, and which of it has places in the arena."""
    buffers = activation_buffers(step)
    return Activations(buffers, _placed(step, buffers) if step.is_persistent else {})


def _placed(step: StepGraph, buffers: Mapping[fx.Node, Buffer]) -> dict[fx.Node, PlacedTemporary]:
    """The temporaries that have places in the arena: large ones on the CPU, of operators with `out=`."""
    large = {node: buffer for node, buffer in buffers.items() if buffer.nbytes >= PLACED_FROM_BYTES}
    return {node: PlacedTemporary(buffers[node], variant) for node, variant in placeable(step, large).items()}


def placeable(step: StepGraph, buffers: Mapping[fx.Node, Buffer]) -> dict[fx.Node, tuple[Any, str]]:
    """The temporaries that can have places, whatever their sizes, and how an operator writes into them."""
    returned = {memory_of(value) for value in (*step.model_outputs, *step.input_grads) if isinstance(value, fx.Node)}
    returned |= {memory_of(value) for value in step.observed}  # a hook may keep them
    if step.sharding.is_alone:  # islands keep their inputs as they are, see `capture/islands/site.py`
        islands = [node for node in step.nodes(Role.COMPUTE) if is_island(node)]
        returned |= {memory_of(value) for island in islands for value in island.all_input_nodes}
    found: dict[fx.Node, tuple[Any, str]] = {}
    for node, buffer in buffers.items():
        value, is_operator = node.meta["val"], torch_internals.is_overload(node.target)
        if buffer.kind is not Kind.TEMPORARY or node in returned:
            continue
        if not is_operator or value.device.type != "cpu" or not value.is_contiguous():
            continue
        if variant := torch_internals.out_variant(node.target):
            found[node] = variant
    return found


def activation_buffers(step: StepGraph) -> dict[fx.Node, Buffer]:
    """The memory that compute nodes allocate, by the node that does.

    The kind is SAVED if backward reads what forward made, else TEMPORARY. Outputs count until the phase that returns
    them ends; how long the caller keeps them is not known. What operators allocate inside is not counted, but for
    regions, whose own memory is that of the node that calls them.
    """
    at, phase_of, static = step.positions(), step.phase_of(), set(static_nodes(step))
    memory = memories(step.graph)
    allocating = [node for node in step.nodes(Role.COMPUTE) if memory[node] is node]
    until, boundary = _ends(step, at, memory, allocating), step.end_forward
    buffers: dict[fx.Node, Buffer] = {}
    for node in allocating:
        is_inside = is_region(node)
        nbytes = inside_bytes(region_of(node)) if is_inside else tensor_bytes(node.meta.get("val"))
        if node in static or not nbytes:
            continue
        start = at[_operator_of(node)]
        end = start if is_inside else until.get(node, start)
        is_saved = boundary is not None and phase_of[node] is Phase.FORWARD and end > at[boundary]
        buffers[node] = Buffer(Kind.SAVED if is_saved else Kind.TEMPORARY, info(node).fqn, nbytes, start, end)
    return buffers


def _operator_of(node: fx.Node) -> fx.Node:
    """The operator that allocates a value: that of the whole tuple for one of several outputs."""
    return cast(fx.Node, node.args[0]) if node.target is operator.getitem else node


def _ends(
    step: StepGraph, at: Mapping[fx.Node, int], memory: Mapping[fx.Node, fx.Node], allocating: Sequence[fx.Node]
) -> dict[fx.Node, int]:
    """The last position at which the memory of each node is held by some variable of the generated code.

    Args:
        at: the position of each node.
        memory: the node that made its memory.
        allocating: compute nodes that stand for memory of their own.
    """
    ends: dict[fx.Node, int] = {}

    def hold(memory: fx.Node, until: int) -> None:
        ends[memory] = max(ends.get(memory, 0), until)

    for node in step.graph.nodes:
        if node.op == "output":
            continue
        until = max(at[until] for until in read_until(node))
        for source in torch_internals.input_nodes(node):
            hold(source if node.target is operator.getitem and not is_view(source) else memory[source], until)
    for values, end in ((step.model_outputs, step.end_forward or step.output), (step.input_grads, step.output)):
        for value in values:
            if isinstance(value, fx.Node):
                hold(memory[value], at[end])
    for node in allocating:  # the tuple of several outputs holds them all until its last is taken
        if node.target is operator.getitem:
            hold(node, ends.get(_operator_of(node), 0))
    return ends
