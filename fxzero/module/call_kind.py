"""Kinds of calls: what chooses a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from fxzero.capture.call import CallSpec, TensorLeaf

Pattern: TypeAlias = tuple[int, ...]
"""Which of the flat outputs receive a gradient."""


@dataclass(frozen=True)
class Signature:
    """What chooses a plan."""

    call: CallSpec
    training: tuple[bool, ...]
    trained: tuple[bool, ...]
    grad: bool
    autocast: tuple[bool, Any]

    @property
    def tensor_leaves(self) -> list[TensorLeaf]:
        """Geometry of the tensors among the arguments."""
        return [leaf for leaf in self.call.leaves if isinstance(leaf, TensorLeaf)]

    @property
    def flags(self) -> tuple[Any, ...]:
        """What the same script sets on all ranks alike.

        Which inputs require grad, the arguments that are no tensors, autocast, and train or eval.
        """
        plain = tuple(leaf.requires_grad if isinstance(leaf, TensorLeaf) else leaf for leaf in self.call.leaves)
        return self.call.structure, plain, self.autocast, self.training
