"""What keeps a step out of a CUDA graph: work on the host, or memory that is elsewhere at each call."""

import operator
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.aliasing import memory_of
from fxzero.graph.names import describe
from fxzero.graph.nodes import Role, info, is_island, is_observer, model_collective, role
from fxzero.graph.regions import is_region
from fxzero.graph.step import StepGraph

_GIVEN = (Role.INPUT, Role.STATE, Role.BUFFER)
_ON_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_WAITS_FOR_HOST = "waits on the host for values of a tensor"
_INDEXES = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index_put.default,
    torch.ops.aten._index_put_impl_.default,
)
"""They read a mask on the host; not so indices."""


def obstacle(step: StepGraph, device: torch.device, *, is_capturable: bool) -> str | None:
    """Why a step cannot be a CUDA graph, with the node and the user's line; None if nothing is known against it.

    Args:
        device: on which it computes.
        is_capturable: the backend's collectives can be in a graph.
    """
    for node in step.graph.nodes:
        reason = _reason(step, node, device, is_capturable=is_capturable)
        if reason is not None:
            line = f" at {' '.join(node.stack_trace.split())}" if node.stack_trace else ""
            return f"{describe(node)} ({node.name}){line} {reason}"
    return _of_outputs(step)


def _reason(step: StepGraph, node: fx.Node, device: torch.device, *, is_capturable: bool) -> str | None:
    kind = role(node)
    if kind in (Role.ALL_GATHER, Role.REDUCE_SCATTER):
        return (
            None
            if is_capturable
            else "is a collective that no graph can hold (a backend other than NCCL, or a mesh of nodes)"
        )
    if kind in _GIVEN:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return "is a Python value, which a graph would keep as it was"
        if _is_expanded(value):
            return "is an expanded tensor, into which nothing can be copied"
        return None if value.device == device else f"lies on {value.device}"
    if kind is Role.CONSTANT:
        value = step.constants[cast(str, node.target)]
        return None if value.device == device or value.dim() == 0 else f"is copied from {value.device}"
    return _of_compute(node, device) if kind is Role.COMPUTE else None


def _of_compute(node: fx.Node, device: torch.device) -> str | None:
    if is_island(node):
        return "is an island, which runs as it is"
    if is_observer(node):
        return "is a hook, which runs on the host"
    if name := model_collective(node):
        return f"is a collective of the model ({name})"
    target = cast(Any, node.target)
    if is_region(node) or target is operator.getitem:
        return None
    if not torch_internals.is_overload(target):
        return "is Python code, which runs on the host"
    if target in _INDEXES:
        indices = cast("tuple[fx.Node | None, ...]", node.args[1])
        masks = [each for each in indices if each is not None and each.meta["val"].dtype in (torch.bool, torch.uint8)]
        return _WAITS_FOR_HOST if masks else None
    if not set(_ON_HOST).isdisjoint(target.tags):
        return _WAITS_FOR_HOST
    value = node.meta.get("val")
    made = value if isinstance(value, (tuple, list)) else (value,)
    elsewhere = [each.device for each in made if isinstance(each, torch.Tensor) and each.device != device]
    return f"computes on {elsewhere[0]}" if elsewhere else None


def _is_expanded(value: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))


def _of_outputs(step: StepGraph) -> str | None:
    """Why what the step returns and writes cannot be given out as in a plain step."""
    written = {node.args[0] for node in step.graph.nodes if node.target is torch.ops.aten.copy_.default}
    for node in step.arguments:
        if node in written:
            return f"the call writes into its input {info(node).fqn}"
    outputs = [node for node in step.model_outputs if isinstance(node, fx.Node)]
    owners: dict[fx.Node, fx.Node] = {}
    for node in outputs:
        memory = memory_of(node)
        if role(memory) in (Role.INPUT, Role.STATE) and not same_view(memory, node):
            return f"the call returns a view of its input {info(memory).fqn}"
        if role(memory) not in (*_GIVEN, Role.WAIT) and _is_expanded(node.meta["val"]):
            return "the call returns an expanded tensor"
        first = owners.setdefault(memory, node)
        if role(memory) not in _GIVEN and not same_view(first, node):
            return f"the call returns two different views of one tensor ({first.name}, {node.name})"
    return None


def same_view(one: fx.Node, other: fx.Node) -> bool:
    """True for values of one memory that show the same part of it, such as a tensor and what `detach` makes of it."""
    first, second = one.meta["val"], other.meta["val"]
    return (first.shape, first.stride(), first.storage_offset(), first.dtype) == (
        second.shape,
        second.stride(),
        second.storage_offset(),
        second.dtype,
    )
