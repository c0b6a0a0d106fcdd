"""Which files, modules and classes are the user's: their state is followed, that of torch and of libraries is not."""

import enum
import functools
import logging
import types
from typing import Any

from torch import Tensor, nn

from fxzero.capture.provenance import is_user_file

_NOT_USERS = ("torch", "numpy", "sympy", "mpmath", "typing_extensions", "networkx")
"""Installed packages that a trace itself runs."""
_NOT_FOLLOWED = (
    *_NOT_USERS,
    "logging",
    "threading",
    "collections",
    "functools",
    "weakref",
    "abc",
    "os",
    "typing",
    "re",
)
"""Packages whose classes are left alone."""
_IMMUTABLE_TYPE, _HEAP_TYPE = 1 << 8, 1 << 9
"""Bits of `type.__flags__`: attributes of the class cannot be set; the class was made by a class statement."""


@functools.cache
def is_followed_file(filename: str) -> bool:
    """True for the user's files, and for those of installed packages that a trace itself does not run."""
    installed = filename.replace("\\", "/").rpartition("site-packages/")[2]
    return is_user_file(filename) and not filename.startswith("<frozen") and not installed.startswith(_NOT_USERS)


def is_plain_class(kind: type) -> bool:
    """True for a class whose instances are plain objects with state that is worth following."""
    no_objects = (nn.Module, Tensor, type, enum.Enum, tuple, list, dict, set, types.ModuleType, logging.Filterer)
    return is_users_class(kind) and not issubclass(kind, no_objects)


def is_users_module(value: Any) -> bool:
    """True for a module whose code is followed."""
    return isinstance(value, types.ModuleType) and is_followed_file(getattr(value, "__file__", None) or "<string>")


def is_guarded_class(kind: type) -> bool:
    """True for a class whose attributes are guarded: also for those of fxzero's own models."""
    return kind.__module__.split(".")[0] not in _NOT_FOLLOWED


def is_of_a_class_statement(kind: type) -> bool:
    """True for a class that Python code made."""
    return bool(kind.__flags__ & _HEAP_TYPE)


def is_users_class(kind: type) -> bool:
    """True for a class whose attributes can be set, and that is no part of torch or the standard library."""
    can_be_set = is_of_a_class_statement(kind) and not kind.__flags__ & _IMMUTABLE_TYPE
    return can_be_set and kind.__module__.split(".")[0] not in (*_NOT_FOLLOWED, "fxzero")
