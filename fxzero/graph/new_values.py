"""What the new values of parameters that forward writes are computed from, which must be the same on all ranks."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.graph.nodes import Role, info, is_random, model_collective, role
from fxzero.graph.step import StepGraph

_EQUAL_ON_ALL = ("all_reduce", "all_gather", "broadcast")
"""Beginnings of the names of collectives that give every rank of their group the same."""
_MARK = "\0"
"""Before and behind the index of a number."""
_OF_EACH_RANK = {Role.INPUT: "the input", Role.BUFFER: "the buffer", Role.STATE: "the tensor"}


def differing_between_ranks(step: StepGraph, value: fx.Node) -> str:
    """What a value depends on that each rank has its own of; empty for a value that is the same on all ranks."""
    for node in _computed_from(step, [value]):
        if role(node) in _OF_EACH_RANK and isinstance(node.meta["val"], Tensor):
            return f"{_OF_EACH_RANK[role(node)]} {info(node).fqn}"
        if is_random(node):
            return f"random numbers ({node.target})"
    return ""


class Computation:
    """How a step computes the new values of parameters, as a number that tells the computations of ranks apart.

    A number of the Python state counts by its value: one rank may have it as an input, and another as a constant.
    """

    def __init__(self, step: StepGraph) -> None:
        above = _computed_from(step, [*step.new_values.values()])
        nodes = [node for node in step.graph.nodes if node in above and node.op != "placeholder"]
        names = {node: f"%{index}" for index, node in enumerate(nodes)}
        names |= {node: f"{role(node).value} {info(node).fqn}" for node in above if node.op == "placeholder"}
        names |= {node: f"{_MARK}{index}{_MARK}" for index, node in enumerate(step.nodes(Role.STATE))}
        lines = [f"{names[node]} = {_text(step, node, names)}" for node in nodes]
        lines += [f"{fqn} = {names[value]}" for fqn, value in step.new_values.items()]
        self._pieces: list[Any] = "\n".join(lines).split(_MARK)
        self._numbers = [int(index) for index in self._pieces[1::2]]

    def digest(self, state: Sequence[Any]) -> int:
        """The number for one call.

        Args:
            state: the values of the STATE placeholders.
        """
        if self._numbers:
            self._pieces[1::2] = [repr(state[index]) for index in self._numbers]
        return zlib.crc32("".join(self._pieces).encode())


class _Name(str):
    """A name that is written without quotes."""

    __repr__ = str.__str__


def _text(step: StepGraph, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.op == "get_attr":
        return repr(step.constants[str(node.target)].tolist())
    if _is_equal_on_all(step, node):
        return model_collective(node)
    target: Any = node.target
    args = fx.map_arg((node.args, dict(node.kwargs)), lambda source: _Name(names[source]))
    args = torch_internals.tree_map_only(torch.device, lambda device: device.type, args)
    return f"{getattr(target, '__name__', target)} {args!r}"


def _computed_from(step: StepGraph, values: list[fx.Node]) -> dict[fx.Node, None]:
    """Some values and all that they are computed from, up to what collectives of the model make equal on all ranks."""
    above, waiting = dict.fromkeys(values), list(values)
    while waiting:
        node = waiting.pop()
        if not _is_equal_on_all(step, node):
            waiting += [source for source in node.all_input_nodes if source not in above]
            above |= dict.fromkeys(node.all_input_nodes)
    return above


def _is_equal_on_all(step: StepGraph, node: fx.Node) -> bool:
    """True for a collective of the model's own that gives all ranks the same."""
    if not model_collective(node).startswith(_EQUAL_ON_ALL):
        return False
    return torch_internals.size_of_group(node) == step.sharding.world_size
