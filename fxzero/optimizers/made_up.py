"""State that an optimizer made because torch.distributed.checkpoint asked for it before the first step.

torch sets zero gradients and takes a step with lr=0. Parameters stay as they are, but the state is not that of an
optimizer that has not stepped: its step counts 1, and weight decay is in the momentum of SGD.

event                              what becomes of the state
torch's step is over               set to what an optimizer that has not stepped begins with, where that is known
something is loaded into it        kept, as a loaded one
the first step of the training     dropped if nothing was loaded: the optimizer makes its own, as without the question
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from fxzero import torch_internals

_BEGIN_WITH_ZEROS = frozenset(
    {
        torch.optim.Adadelta,
        torch.optim.Adafactor,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.Muon,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.SGD,
    }
)
"""Optimizers whose first step is the same from no state as from zeros; SGD with dampening is not."""
_BEGIN_WITH_ONE = "mu_product"
_made_up: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[object, int]] = weakref.WeakKeyDictionary()
"""The state that was made up, and how often its tensors had been changed then."""


def note(optimizer: torch.optim.Optimizer) -> None:
    """The step that makes the state of an optimizer is over."""
    if _is_neutral(optimizer):
        for state in optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    value.fill_(1 if key == _BEGIN_WITH_ONE else 0)
    _made_up[optimizer] = optimizer.state, _num_changes(optimizer)


def is_noted(optimizer: torch.optim.Optimizer) -> bool:
    """True if a step to make state was taken, though there may have been none to make on this rank."""
    return optimizer in _made_up


def is_unusable(optimizer: torch.optim.Optimizer) -> bool:
    """True if the state was made up, and training that goes on from it would not be that of a new optimizer."""
    return _is_as_made(optimizer) and not _is_neutral(optimizer)


def drop(optimizer: torch.optim.Optimizer) -> bool:
    """Drop the state before a step of the training, if it was made up and nothing was loaded; returns if it was."""
    if not is_noted(optimizer):
        return False
    is_as_made = _is_as_made(optimizer)
    if is_as_made:
        optimizer.state.clear()
    _made_up.pop(optimizer, None)
    return is_as_made


def _is_as_made(optimizer: torch.optim.Optimizer) -> bool:
    state, num_changes = _made_up.get(optimizer, (None, 0))
    return state is optimizer.state and num_changes == _num_changes(optimizer)


def _is_neutral(optimizer: torch.optim.Optimizer) -> bool:
    is_damped = any(group.get("dampening") for group in optimizer.param_groups)
    return type(optimizer) in _BEGIN_WITH_ZEROS and not is_damped


def _num_changes(optimizer: torch.optim.Optimizer) -> int:
    return torch_internals.num_changes(_tensors(optimizer))


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
