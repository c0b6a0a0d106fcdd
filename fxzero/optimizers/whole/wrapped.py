"""State in tensors of a class of its own, such as codes of 8 bits with their scales, saved by the tensors inside.

A file has no classes, so what is read is put into the form that the optimizer itself makes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxzero.errors import CheckpointError
from fxzero.optimizers.state import name_of


@dataclass(frozen=True)
class Inside:
    """The tensors that were read for one of a class of its own, by their names in it."""

    tensors: dict[str, Tensor]


def inside(value: Any) -> dict[str, Tensor]:
    """The tensors in one of a class of its own, by name; empty for a plain one, and a class that does not name them."""
    if type(value) is Tensor or not hasattr(value, "__tensor_flatten__"):
        return {}
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def put_together(optimizer: torch.optim.Optimizer, state: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """State that was read, with tensors of the classes that the state of an optimizer has.

    Raises:
        CheckpointError: the optimizer has no state of such a class.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        index: {
            key: _like(value, optimizer.state.get(params[index], {}).get(key), f"{key!r} of {name_of(optimizer)}")
            for key, value in values.items()
        }
        for index, values in state.items()
    }


def _like(value: Any, pattern: Any, name: str) -> Any:
    if not isinstance(value, Inside):
        return value
    own = inside(pattern)
    if {key: (each.shape, each.dtype) for key, each in own.items()} != {
        key: (each.shape, each.dtype) for key, each in value.tensors.items()
    }:
        raise CheckpointError(
            f"State {name} was saved as a tensor made of {', '.join(value.tensors)}, and is none such here. Build the "
            "optimizer as in the run that saved, and call optimizer.zero_grad() before its state is loaded."
        )
    _, context = pattern.__tensor_flatten__()
    made = {key: each.to(own[key].device) for key, each in value.tensors.items()}
    return type(pattern).__tensor_unflatten__(made, context, pattern.size(), pattern.stride())
