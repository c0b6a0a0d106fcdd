"""Kinds of calls, each of which has a plan of its own for each pattern of arriving gradients.

key of a plan    known when            contents
Signature        a call begins         geometry and plain values of the arguments, modes of torch and of the modules
Pattern          its backward begins   outputs that receive a gradient; a forward assumes those of the call before
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

from fxzero.capture.call import CallSpec, TensorLeaf

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of a call."""
Pattern: TypeAlias = tuple[int, ...]
"""Indices of the flat outputs that receive a gradient."""


@dataclass(frozen=True)
class Signature:
    """Everything that chooses the plan of a call when it begins."""

    call: CallSpec
    training: tuple[bool, ...]
    """`training` of each module."""
    trained: tuple[bool, ...]
    """`requires_grad` of each parameter."""
    grad: bool
    """`torch.is_grad_enabled()`."""
    autocast: tuple[bool, Any]
    """Whether autocast is on for the device that computes, and its dtype then."""

    @property
    def tensor_leaves(self) -> list[TensorLeaf]:
        """The geometry of each tensor among the arguments."""
        return [leaf for leaf in self.call.leaves if isinstance(leaf, TensorLeaf)]
