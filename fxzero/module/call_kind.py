"""Kinds of calls: what chooses a plan, and the order of its collectives, which all ranks agree on the first time.

Ranks may meet different shapes in one step, so no rank may wait for others because a shape is new to it. What a call
has in common on all ranks is its mode; whatever else it has may change nothing about its collectives, with one
exception: flags, which the same script sets on every rank (`use_head=False`, `model.eval()`), may lead to other
collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxzero.capture.call import CallSpec, is_tensor_leaf


@dataclass(frozen=True)
class Signature:
    """What chooses a plan."""

    call: CallSpec
    training: tuple[bool, ...]
    trained: tuple[bool, ...]
    grad: bool
    autocast: tuple[bool, Any]
    synchronize: bool

    @property
    def tensor_leaves(self) -> list[tuple[Any, ...]]:
        """Geometry of the tensors among the arguments."""
        return [leaf for leaf in self.call.leaves if is_tensor_leaf(leaf)]

    @property
    def flags(self) -> tuple[Any, ...]:
        """What the same script sets on all ranks alike.

        Which inputs require grad, the arguments that are no tensors, autocast, and train or eval.
        """
        plain = tuple(leaf[4] if is_tensor_leaf(leaf) else leaf for leaf in self.call.leaves)
        return self.call.structure, plain, self.autocast, self.training
