"""A closure that an optimizer calls in its step, called before the parameters become whole for that step."""

from collections.abc import Callable
from typing import Any

import torch

from fxzero.errors import OptimizerError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of `optimizer.step`, the optimizer first."""


class _Returns:
    """Stands in for a closure that has been called: gives its result, once."""

    def __init__(self, result: Any) -> None:
        self._results = [result]

    def __call__(self) -> Any:
        if not self._results:
            raise OptimizerError(
                "The optimizer calls its closure more than once in a step. With whole parameters the closure can be "
                "called once, before the step."
            )
        return self._results.pop()


def called_before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Call the closure among the arguments of a step, and let what it returned be in its place; None without one."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None
    with torch.enable_grad():
        stand_in = _Returns(closure())
    if len(args) > 1:
        return (args[0], stand_in, *args[2:]), kwargs
    return args, {**kwargs, "closure": stand_in}
