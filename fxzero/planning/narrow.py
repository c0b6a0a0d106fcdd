"""The plan of a backward that gets gradients for some of the outputs that its forward has prepared for.

    prepared for    loss_a, loss_b      mm a | mm b | write_grad a | write_grad b | reduce_scatter (a, b)
    narrowed        loss_a              mm a |        write_grad a | (unreached)  | reduce_scatter (a, b)

A backward is linear in the gradients that arrive, so what is computed from missing ones alone is dropped, as autograd
does; where it meets others it is zeros. Forward, the collectives and all places in memory stay as they are: a rank may
run it while others run the whole backward, and no forward runs again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import fx

from fxzero.graph import ops
from fxzero.graph.aliasing import memory_of
from fxzero.graph.nodes import (
    META_KEY,
    NodeInfo,
    Role,
    grad_fqn,
    grad_of,
    info,
    is_pure,
    model_collective,
    new_value,
    role,
    tensor_bytes,
    written_in_place,
)
from fxzero.graph.regions import inputs_of_place, inputs_of_result, is_region, region_inputs, region_places
from fxzero.graph.step import StepGraph, copy_of
from fxzero.graph.verify import verify_plan
from fxzero.memory.activations import Activations
from fxzero.memory.arena_plan import ArenaPlan
from fxzero.memory.lifetimes import Buffer
from fxzero.planning.plan import Plan, VariantPlan, code_of
from fxzero.planning.stream_events import plan_stream_events

Value = TypeVar("Value")
Nodes = dict[fx.Node, fx.Node]
"""Maps nodes of a step to those of its copy."""


def narrow(plan: Plan, pattern: tuple[int, ...]) -> Plan:
    """The plan for a backward in which only some of the differentiated outputs receive a gradient.

    Its forward is never run; its backward takes what the forward of `plan` saves.

    Args:
        pattern: indices of those outputs, among `plan.captured.differentiated`.
    """
    present = [index in pattern for index in plan.captured.differentiated]
    narrowed: dict[int, tuple[StepGraph, Nodes]] = {}
    variants: dict[Any, VariantPlan] = {}
    for variant, planned in plan.variants.items():
        if id(planned.step) not in narrowed:
            narrowed[id(planned.step)] = _narrow_step(planned.step, present)
        variants[variant] = _moved(planned, *narrowed[id(planned.step)], accumulate=variant.accumulate)
    captured = dataclasses.replace(plan.captured, differentiated=pattern)
    return dataclasses.replace(plan, captured=captured, variants=variants)


# -- the graph -------------------------------------------------------------------------------------------------------


def _narrow_step(step: StepGraph, present: list[bool]) -> tuple[StepGraph, Nodes]:
    """A copy of a final step without the backward of missing gradients, and where each remaining node went."""
    copy = copy_of(step)
    nodes = dict(zip(step.graph.nodes, copy.graph.nodes, strict=True))
    tangents = copy.nodes(Role.TANGENT)
    missing = {node for node, is_there in zip(tangents, present, strict=True) if not is_there}
    blank = _blank_values(copy, set(tangents), missing)
    unreached = _leave_out(copy, blank)
    grads = {fqn: node for fqn, node in copy.grads.items() if fqn not in unreached}
    copy.set_output(copy.model_outputs, grads, [None if grad in blank else grad for grad in copy.input_grads])
    _erase_idle(copy, blank)
    for tangent in missing:
        copy.graph.erase_node(tangent)
    verify_plan(copy)
    remaining = set(copy.graph.nodes)
    return copy, {old: new for old, new in nodes.items() if new in remaining}


def _blank_values(step: StepGraph, arriving: set[fx.Node], missing: set[fx.Node]) -> set[fx.Node]:
    """The values of backward that are computed from missing gradients alone; where others come in, zeros replace them.

    Args:
        arriving: the gradients of all outputs.
        missing: those that do not arrive.
    """
    linear, blank = set(arriving), set(missing)
    _, (_, backward) = step.phases()
    for node in backward:
        sources = [source for source in node.all_input_nodes if source in linear]
        if role(node) is not Role.COMPUTE or not sources:
            continue
        if is_region(node):
            _blank_results(step, node, linear, blank)
            continue
        linear.add(node)
        if blank.issuperset(sources) and not model_collective(node):
            blank.add(node)
            continue
        for source in blank.intersection(sources):
            if node.target is ops.island_backward:  # it takes None for no gradient
                node.args = fx.map_arg(node.args, lambda each, gone=source: None if each is gone else each)
                continue
            node.replace_input_with(source, _zeros_before(step, node, source))
    return blank


def _blank_results(step: StepGraph, region: fx.Node, linear: set[fx.Node], blank: set[fx.Node]) -> None:
    """Go through the results of a region, each of which is computed from some of its inputs."""
    read = {result: inputs_of_result(result) for result in region.users}
    read |= {place: inputs_of_place(region, place) for place in region_places(region)}
    gone: list[fx.Node] = []
    for result, inputs in read.items():
        sources = inputs.intersection(linear)
        if sources:
            linear.add(result)
        if sources and blank.issuperset(sources):
            blank.add(result)
            gone.append(result)
    if len(gone) == len(read):
        blank.add(region)
        return
    given = dict.fromkeys((*region_inputs(region), *region_places(region)))
    for source in [source for source in given if source in blank]:
        region.replace_input_with(source, _zeros_before(step, region, source))


def _zeros_before(step: StepGraph, node: fx.Node, source: fx.Node) -> fx.Node:
    """Zeros of a value's geometry, written in front of a node."""
    value = cast(torch.Tensor, source.meta["val"])
    numel = tensor_bytes(value) // value.dtype.itemsize
    place: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    with step.graph.inserting_before(node):
        flat = step.graph.call_function(torch.ops.aten.zeros.default, ([numel],), place)
        strided = (flat, list(value.shape), list(value.stride()))
        zeros = step.graph.call_function(torch.ops.aten.as_strided.default, strided)
    for each in (flat, zeros):
        each.meta[META_KEY] = NodeInfo(Role.COMPUTE, info(node).fqn)
    new_value(flat, value.new_empty(numel))
    return new_value(zeros, value)


def _leave_out(step: StepGraph, blank: set[fx.Node]) -> set[str]:
    """Let slots whose gradient is blank be written without one; the names of their parameters."""
    unreached: set[str] = set()
    for slot in step.nodes(Role.WRITE_GRAD):
        if grad_of(slot) in blank:
            unreached.add(grad_fqn(slot))
            slot.args = (None, grad_fqn(slot))
    return unreached


def _erase_idle(step: StepGraph, blank: set[fx.Node]) -> None:
    """Erase from backward what nothing reads any more, with the slots that nothing is computed in."""
    written = {written_in_place(slot) for slot in step.nodes(Role.WRITE_GRAD)}
    idle = {memory for memory in step.nodes(Role.GRAD_SLOT) if memory not in written}
    _, (_, backward) = step.phases()
    in_idle = [node for node in backward if memory_of(node) in idle]
    for node in reversed(backward):
        is_idle = node in blank or node in in_idle or (role(node) is Role.COMPUTE and is_pure(node))
        if is_idle and not node.users:
            step.graph.erase_node(node)


# -- memory and code -------------------------------------------------------------------------------------------------


def _moved(planned: VariantPlan, step: StepGraph, nodes: Nodes, *, accumulate: bool) -> VariantPlan:
    """A variant whose step was narrowed: everything that remains keeps its place in memory."""
    at = step.positions()
    positions = [at[nodes[node]] if node in nodes else None for node in planned.step.graph.nodes]

    def moved(buffer: Buffer) -> Buffer:
        live = [at for at in positions[buffer.start : buffer.end + 1] if at is not None]
        return dataclasses.replace(buffer, start=live[0], end=live[-1])

    def remaining(values: Mapping[fx.Node, Value]) -> dict[fx.Node, Value]:
        return {nodes[node]: value for node, value in values.items() if node in nodes}

    activations = planned.activations
    activations = Activations(
        {node: moved(buffer) for node, buffer in remaining(activations.buffers).items()},
        {
            node: dataclasses.replace(placed, buffer=moved(placed.buffer))
            for node, placed in remaining(activations.placed).items()
        },
    )
    places = planned.arena.placed.items()
    placed = {
        (kind, nodes[node]): (moved(buffer), offset) for (kind, node), (buffer, offset) in places if node in nodes
    }
    events = None if planned.events is None else plan_stream_events(step, placed, accumulate=accumulate)
    saved = tuple(nodes[node] for node in planned.code.saved)
    code = code_of(step, activations, placed, events, saved=saved)
    return VariantPlan(step, activations, ArenaPlan(planned.arena.memory, placed), events, code)
