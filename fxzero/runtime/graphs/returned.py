"""What a replayed phase gives out: its results lie in memory that the next replay overwrites."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxzero.graph.aliasing import memory_of
from fxzero.graph.nodes import Role, role
from fxzero.graph.step import StepGraph


@dataclass(frozen=True)
class Returned:
    """For each flat output of forward, where the tensor comes from that a user may keep."""

    inputs: dict[int, int]
    """Outputs that are inputs, by the number of the input: in the memory of the user's."""
    buffers: frozenset[int]
    """Outputs in the memory of buffers, which belongs to the model."""
    same: dict[int, int]
    """Outputs that show the memory of an earlier one, by the number of that."""

    @classmethod
    def of(cls, step: StepGraph) -> "Returned":
        """Of a step that has no `obstacle`."""
        arguments = {node: index for index, node in enumerate(step.arguments)}
        inputs, buffers, same = dict[int, int](), set[int](), dict[int, int]()
        first: dict[fx.Node, int] = {}
        for index, node in enumerate(step.model_outputs):
            if not isinstance(node, fx.Node):
                continue
            memory = memory_of(node)
            if memory in arguments:
                inputs[index] = arguments[memory]
            elif role(memory) is Role.BUFFER:
                buffers.add(index)
            elif (before := first.setdefault(memory, index)) != index:
                same[index] = before
        return cls(inputs, frozenset(buffers), same)

    def outputs(self, static: Sequence[Any], inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """The outputs of a replay.

        Args:
            static: as they lie in the memory of the graph.
            inputs: of the call.
        """
        given: list[Any] = []
        for index, value in enumerate(static):
            if index in self.inputs:
                given.append(inputs[self.inputs[index]].detach())
            elif index in self.same:
                given.append(given[self.same[index]].detach())
            elif index in self.buffers:
                given.append(value.detach())
            else:
                given.append(kept(value))
        return tuple(given)


def kept(value: Any) -> Any:
    """A copy of a tensor that outlives the next replay; other values are constants."""
    return value.clone() if isinstance(value, torch.Tensor) else value
