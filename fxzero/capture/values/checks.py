"""Checks of values that a forward makes: the step computes what is checked, and looks at it after forward.

    torch._check_tensor_all(mask.sum() == n, lambda: "they do not match")       also with _with(ValueError, ...)
    torch._assert((x > 0).all(), "must be positive")
    torch.distributions.Normal(mean, std)                                        its arguments, and those of log_prob

A trace takes it that a check passes. A step whose values do not pass raises what the check would, after its forward.
"""

import contextlib
import re
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from torch import Tensor

from fxzero import torch_internals
from fxzero.capture.provenance import is_user_file

Note = Callable[[Callable[[Tensor], None], tuple[Tensor]], object]
"""Called with a function, and the traced tensors that each step must call it with after its forward."""


@contextlib.contextmanager
def noted_checks(note: Note) -> Generator[None]:
    """Note the checks of traced tensors in the block, instead of reading them."""

    def check_with(error: type[Exception], condition: Tensor, message: Any = None) -> None:
        if not torch_internals.is_fake(condition):
            return real_check(error, condition, message)
        note(partial(_check, error, _text_of(message)), (condition,))
        return None

    def check_all(condition: Tensor, message: Any = None) -> None:
        check_with(RuntimeError, condition, message)

    def check_assertion(condition: Any, message: Any) -> None:
        if not torch_internals.is_fake(condition):
            return real_assert(condition, message)
        note(partial(_check, AssertionError, _text_of(message)), (condition.all(),))
        return None

    def is_all_true(condition: Tensor) -> Any:
        caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        if not torch_internals.is_fake(condition) or not caller.f_globals.get("__name__", "").startswith(
            "torch.distributions"
        ):
            return real_is_all_true(condition)
        kind = type(caller.f_locals.get("self")).__name__
        name = caller.f_locals.get("param", "value")
        text = f"Expected {name} of distribution {kind} to satisfy its constraint, but found invalid values"
        note(partial(_check, ValueError, _text_of(text)), (condition,))
        return True

    real_check, real_assert, real_is_all_true = torch_internals.check_functions()
    with torch_internals.replaced_checks(check_with, check_all, check_assertion, is_all_true):
        yield


def _text_of(message: Any) -> str:
    """The text of a check that fails, with the user's line; values of tensors are not known in it."""
    text = str(message() if callable(message) else message or "A check of forward failed")
    return f"{re.sub(r'FakeTensor[(][^)]*[)]+', '<a tensor>', text)} (checked at {_users_line()})"


def _users_line() -> str:
    frame: Any = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _check(error: type[Exception], text: str, condition: Tensor) -> None:
    if not condition.all():
        raise error(text)
