"""Which optimizers can step shards: the element-wise ones, whose update of an element needs that element alone.

An element-wise optimizer gives the same numbers on a slice of a parameter as on the whole, bit for bit. One that
looks at the shape of a parameter, or at several elements at once, does not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxzero.errors import OptimizerError
from fxzero.optimizers.probe import why_not_elementwise

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
    torch.optim.Adafactor: "it factors second moments over the rows and columns of whole matrices",
    torch.optim.Muon: "it orthogonalises whole matrices, and a shard is a slice of one, not a matrix",
    torch.optim.SparseAdam: "it takes sparse gradients, and gradient shards are dense",
}
"""The optimizers of torch.optim that are not element-wise, each with the reason."""


def check_optimizer(optimizer: object, *, elementwise_optimizer: bool) -> None:
    """Refuse an optimizer that cannot step shards.

    Args:
        optimizer: any variant (for-loop, foreach, fused, capturable, tensor lr) of the classes in `ELEMENTWISE` passes.
        elementwise_optimizer: the user vouches for any other class, except those in `REFUSED`; else such a class is
            tried on small parameters.

    Raises:
        OptimizerError: the class is refused; the message has the reason and the cure.
    """
    kind = type(optimizer)
    if kind in ELEMENTWISE:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"{kind.__module__}.{kind.__qualname__} is not a torch.optim.Optimizer.")
    known = ", ".join(cls.__name__ for cls in ELEMENTWISE)
    for cls, reason in REFUSED.items():
        if isinstance(optimizer, cls):
            raise OptimizerError(f"{kind.__qualname__} cannot step shards: {reason}. Use one of {known}.")
    if not elementwise_optimizer and (reason := why_not_elementwise(optimizer)):
        raise OptimizerError(
            f"{kind.__module__}.{kind.__qualname__} is not known to be element-wise: {reason}. A shard is a slice of "
            "its parameter. If its update of an element needs only that element's own gradient and state, pass "
            f"elementwise_optimizer=True to fxzero.compile; else use one of {known}."
        )


def state_per_element(optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Elements of state for each element of a parameter: the most of any group of these optimizers.

    It is 2, the number of AdamW, for a class outside torch.optim, and if there is no optimizer yet.
    """
    counts = [
        _STATE_PER_ELEMENT.get(type(optimizer), lambda group: 2)(group)
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    return max(counts, default=2)
