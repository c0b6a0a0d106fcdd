"""Slots of the Python state: where a value was found that a forward read, and what it was.

An attribute of an object, an entry of a dict, a global, a variable of a closure: see `Kind`.
"""

import array
import collections
import ctypes
import enum
import gc
import types
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch

from fxzero.capture.places import Place, attributes_of, slots_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, frozenset, type(Ellipsis), torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of values that never change."""
BUFFERS = (bytearray, array.array, ctypes.c_int.__mro__[1], ctypes.Array, ctypes.Structure, ctypes.Union)
"""Types of small memory that Python code shares: with C, or with other processes (multiprocessing.Value)."""
_CONTAINERS = (list, dict, set, collections.deque)
"""Types of containers whose content is followed, and may be written."""
ABSENT = type("Absent", (), {"__repr__": lambda self: "absent", "__slots__": ()})()
"""Stands for the value of a slot that does not exist."""

Slot: TypeAlias = tuple[int, Hashable]
"""The id of an object and the name of an attribute, or the id of a dict and a key."""


class Kind(enum.Enum):
    """Where a value was found."""

    ATTRIBUTE = "in the object's __dict__"
    CLASS = "in its class"
    SLOT = "in one of its __slots__"
    COMPUTED = "by __getattr__"
    ABSENT = "nowhere"
    GLOBAL = "in the globals of a module"
    CELL = "in a variable of a closure"
    FUNCTION = "in a function: its code, its default arguments"
    SIZE = "how many attributes an object has"


def class_with(kind: type, name: str) -> type | None:
    """The class, of those that a class derives from, that an attribute is found in."""
    return next((base for base in kind.__mro__ if name in vars(base)), None)


@dataclass(frozen=True, eq=False)
class Read:
    """A slot that was read, and what it held at the first read."""

    owner: Any
    """The object; for a global the dict of the module, for a variable of a closure its place."""
    name: str
    kind: Kind
    value: Any
    content: Any = None
    """A shallow copy of a container's content."""
    path: str = ""
    """The name of a module of globals or of a function, where the owner has none."""

    @property
    def place(self) -> dict[Any, Any] | None:
        """The dict, or what is seen as one, that the slot is an entry of; None if there is none."""
        if self.kind is Kind.ATTRIBUTE:
            return vars(self.owner)
        if self.kind is Kind.CLASS:
            kind = class_with(self.owner if isinstance(self.owner, type) else type(self.owner), self.name)
            return None if kind is None else attributes_of(kind)
        if self.kind is Kind.SLOT:
            return slots_of(self.owner)
        return self.owner if self.kind in (Kind.GLOBAL, Kind.CELL) else None


def is_container(value: Any) -> bool:
    """True for a container whose content is followed."""
    return isinstance(value, _CONTAINERS) and not isinstance(value, Place)


def content_of(value: Any) -> Any:
    """A shallow copy of what a container or an array holds; None for all else."""
    if isinstance(value, (list, tuple, collections.deque)):
        return tuple(value)
    if isinstance(value, dict):
        return dict(dict.items(cast("dict[Any, Any]", value)))  # whatever its class makes of a key
    if isinstance(value, types.MappingProxyType):
        return dict(cast("Mapping[Any, Any]", value))
    if isinstance(value, set):
        return frozenset(cast("set[Any]", value))
    if isinstance(value, BUFFERS):
        return bytes(cast("Buffer", value))
    return value.copy() if isinstance(value, np.ndarray) else None


def items_of(content: Any) -> Iterable[Any]:
    """The values in what `content_of` gave; none for what is no container."""
    if isinstance(content, dict):
        return cast("dict[Any, Any]", content).values()
    return cast("tuple[Any, ...]", content) if isinstance(content, tuple) else ()


def behind_proxy(proxy: types.MappingProxyType[Any, Any]) -> Any:
    """The mapping that a read-only view shows."""
    return gc.get_referents(proxy)[0]


def held(value: Any) -> tuple[Any, Any]:
    """A value, and a shallow copy of its content."""
    return value, content_of(value)
