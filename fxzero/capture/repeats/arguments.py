"""The arguments of an operator, taken apart once for all who compare them."""

from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class UnknownArgumentError(Exception):
    """An argument is of a type that is not compared."""


class Arguments:
    """The arguments of one call of an operator.

    Args:
        args, kwargs: as the operator gets them.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._tensors: list[Tensor] = []
        self._structure: Any = None

    @property
    def structure(self) -> Any:
        """All but the tensors, as tuples that can be hashed: equal only if types and, for floats, bits are.

        Raises:
            UnknownArgumentError: there is an argument of another type.
        """
        if self._structure is None:
            tensors: list[Tensor] = []
            self._structure = plain((self.args, self.kwargs), tensors)
            self._tensors = tensors
        return self._structure

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in order; raises as `structure` does."""
        _ = self.structure
        return self._tensors


def plain(value: Any, tensors: list[Tensor]) -> Any:
    """A value with a mark in the place of each tensor, which `tensors` receives.

    Raises:
        UnknownArgumentError: it is, or holds, something of another type.
    """
    kind = type(value)
    if kind is int or value is None:
        return value
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if kind is list or kind is tuple:
        return kind, *[plain(each, tensors) for each in value]
    if kind is bool:
        return bool, value
    if kind is float:
        return float, value.hex()
    if kind is dict:
        return dict, *[(key, plain(each, tensors)) for key, each in value.items()]
    if isinstance(value, _PLAIN):
        return value
    raise UnknownArgumentError(f"an operator has an argument or a result of type {kind.__name__}")
