"""Which optimizers can step shards, and which step whole parameters at their owners.

An element-wise optimizer, whose update of an element needs that element alone, gives the same numbers on a slice of a
parameter as on the whole, bit for bit. One that looks at the shape of a parameter, or at several elements at once, does
not: it steps each parameter whole, on one rank, if it looks at no two parameters at once (`whole/`).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from fxzero.errors import OptimizerError
from fxzero.optimizers.probe import why_not_elementwise, why_not_one_by_one

_Optimizer = TypeVar("_Optimizer", bound=torch.optim.Optimizer)

_STATE_PER_ELEMENT: Mapping[type[torch.optim.Optimizer], Callable[[dict[str, Any]], int]] = {
    torch.optim.Adadelta: lambda group: 2,
    torch.optim.Adagrad: lambda group: 1,
    torch.optim.Adam: lambda group: 2 + group["amsgrad"],
    torch.optim.AdamW: lambda group: 2 + group["amsgrad"],
    torch.optim.Adamax: lambda group: 2,
    torch.optim.ASGD: lambda group: 1,
    torch.optim.NAdam: lambda group: 2,
    torch.optim.RAdam: lambda group: 2,
    torch.optim.RMSprop: lambda group: 1 + (group["momentum"] > 0) + group["centered"],
    torch.optim.Rprop: lambda group: 2,
    torch.optim.SGD: lambda group: int(group["momentum"] != 0),
}
"""Elements of state for each element of a parameter, given its group, of the optimizers known to be element-wise."""

ELEMENTWISE = tuple(_STATE_PER_ELEMENT)
"""The optimizers known to be element-wise: these classes, not their subclasses."""

REFUSED: Mapping[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "its directions come from dot products over all parameters, of which a rank has only a part",
    torch.optim.SparseAdam: "it takes sparse gradients, and gradient shards are dense",
}
"""The optimizers of torch.optim that can step neither shards nor parameters one by one, each with the reason."""

WHOLE = (torch.optim.Adafactor, torch.optim.Muon)
"""The optimizers of torch.optim that need whole parameters, and look at one at a time. Subclasses are tried."""
_marked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers that the user wants to step whole parameters."""


def whole_matrices(optimizer: _Optimizer) -> _Optimizer:
    """Let an optimizer step whole parameters, for one that looks at whole matrices, as Shampoo and SOAP do.

    Each parameter is stepped by one rank, its owner: the optimizer sees the whole parameter and gradient there, and no
    gradient elsewhere. So the optimizer must step each parameter by itself; before its first step copies of it are
    tried on small parameters, with gradients of all and of some. Muon and Adafactor of torch.optim need no such call.

        optimizer = fxzero.whole_matrices(SOAP(model.parameters()))

    Args:
        optimizer: any but LBFGS and SparseAdam; not yet stepped with a compiled model's parameters.

    Returns:
        The optimizer.
    """
    _marked.add(optimizer)
    return optimizer


def steps_wholes(optimizer: torch.optim.Optimizer) -> bool:
    """True for an optimizer that steps whole parameters at their owners, not shards."""
    return isinstance(optimizer, WHOLE) or optimizer in _marked


def check_optimizer(optimizer: object, *, elementwise_optimizer: bool) -> None:
    """Refuse an optimizer that can step neither shards nor whole parameters one by one.

    Args:
        optimizer: any variant (for-loop, foreach, fused, capturable, tensor lr) of the classes in `ELEMENTWISE` passes,
            as do Muon and Adafactor.
        elementwise_optimizer: the user vouches for any other class, except those in `REFUSED`; else such a class is
            tried on small parameters.

    Raises:
        OptimizerError: the class is refused; the message has the reason and the cure.
    """
    kind = type(optimizer)
    if kind in ELEMENTWISE or kind in WHOLE:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"{kind.__module__}.{kind.__qualname__} is not a torch.optim.Optimizer.")
    known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
    for cls, reason in REFUSED.items():
        if isinstance(optimizer, cls):
            raise OptimizerError(f"{kind.__qualname__} cannot step shards: {reason}. Use one of {known}.")
    if steps_wholes(optimizer):
        if reason := why_not_one_by_one(optimizer):
            raise OptimizerError(
                f"{kind.__module__}.{kind.__qualname__} cannot step whole parameters each on one rank: {reason}. Use "
                f"one of {known}, Adafactor, Muon."
            )
        return
    if not elementwise_optimizer and (reason := why_not_elementwise(optimizer)):
        raise OptimizerError(
            f"{kind.__module__}.{kind.__qualname__} is not known to be element-wise: {reason}. A shard is a slice of "
            "its parameter. If its update of an element needs only that element's own gradient and state, pass "
            "elementwise_optimizer=True to fxzero.compile. If it steps each parameter by itself, let it step whole "
            f"ones: fxzero.whole_matrices(optimizer). Else use one of {known}."
        )


def state_per_element(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Elements of state for each element of a parameter: the most of any group of these optimizers.

    It is 2, the number of AdamW, for a class outside torch.optim, and if there is no optimizer yet.
    """
    counts = [
        1 if type(optimizer) in WHOLE else _STATE_PER_ELEMENT.get(type(optimizer), lambda group: 2)(group)
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return max(counts, default=2)
