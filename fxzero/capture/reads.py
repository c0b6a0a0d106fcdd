"""Learns which Python state a forward reads while it is traced: attributes, globals, and variables of closures.

Attributes are seen by a `__getattribute__` that nn.Module itself has during the trace, as has the class of each plain
object (a config, a user's class) that a read returned. No object changes its class. Globals and cells are taken from
the code objects that run, at their call; only those of the user's files count, not of torch or the standard library.

    with reads.following(): output = model(...)
    reads.found                     # each slot that was read before it was written, with what it held then
"""

import collections
import contextlib
import dis
import enum
import functools
import gc
import logging
import sys
import threading
import types
from collections.abc import Callable, Generator, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.provenance import is_user_file

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, frozenset, type(Ellipsis), torch.dtype,
    torch.device, torch.Size, torch.layout, torch.memory_format,
)  # fmt: skip
"""Types of values that never change."""
_BY_IDENTITY = (
    type, enum.Enum, property, functools.partial, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType, types.MethodWrapperType,
)  # fmt: skip
_CONTAINERS = frozenset({list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict})
"""Types of containers whose content is followed, and may be written; not classes made from them."""
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

ABSENT = type("Absent", (), {"__repr__": lambda self: "absent", "__slots__": ()})()
"""Stands for the value of a slot that does not exist."""

Slot: TypeAlias = tuple[int, Hashable]
"""The id of an object and the name of an attribute, or the id of a dict and a key."""


class Kind(enum.Enum):
    """Where a value was found."""

    ATTRIBUTE = "in the object's __dict__"
    CLASS = "in its class"
    COMPUTED = "by __getattr__, or in a slot"
    ABSENT = "nowhere"
    GLOBAL = "in the globals of a module"
    CELL = "in a variable of a closure"


@dataclass(frozen=True, eq=False)
class Read:
    """A slot that was read, and what it held at the first read."""

    owner: Any
    """The object; for a global the dict of the module, for a variable of a closure its cell."""
    name: str
    kind: Kind
    value: Any
    content: Any = None
    """A shallow copy of a container's content."""
    path: str = ""
    """The name of a module of globals or of a function, where the owner has none."""


def is_container(value: Any) -> bool:
    """True for a container whose content is followed."""
    return type(value) in _CONTAINERS


def content_of(value: Any) -> Any:
    """A shallow copy of what a container or an array holds; None for all else."""
    if isinstance(value, (list, tuple, collections.deque)):
        return tuple(value)
    if isinstance(value, (dict, types.MappingProxyType)):
        return dict(cast("Mapping[Any, Any]", value))
    if isinstance(value, set):
        return frozenset(cast("set[Any]", value))
    return value.copy() if isinstance(value, np.ndarray) else None


@functools.cache
def _is_users(filename: str) -> bool:
    installed = filename.replace("\\", "/").rpartition("site-packages/")[2]
    return is_user_file(filename) and not filename.startswith("<frozen") and not installed.startswith(_NOT_USERS)


def _is_plain_class(kind: type) -> bool:
    """True for a class whose instances are plain objects with state that is worth following."""
    flags = kind.__flags__
    no_objects = (nn.Module, Tensor, type, enum.Enum, tuple, list, dict, set, types.ModuleType, logging.Filterer)
    is_users = flags & _HEAP_TYPE and not flags & _IMMUTABLE_TYPE and not issubclass(kind, no_objects)
    return bool(is_users) and kind.__module__.split(".")[0] not in (*_NOT_FOLLOWED, "fxzero")


class Reads:
    """What one forward reads, and the attributes that it sets."""

    def __init__(self, model: nn.Module, on_object: Callable[[Any], None], alive: list[Any]) -> None:
        """
        Args:
            model: its `forward` is not its own during a trace.
            on_object: called with each plain object and container the first time it is met.
            alive: receives objects, so that no id is given again during the trace.
        """
        self.found: dict[Slot, Read] = {}
        self.set_slots: set[Slot] = set()
        """Attributes that were set."""
        self._model, self._on_object = model, on_object
        self._alive = alive
        self._followed: set[int] = set()
        self._patched: dict[type, dict[str, Any]] = {}
        self._codes: dict[types.CodeType, list[tuple[int, ...]]] = {}
        """Code that ran, and the ids of the variables of its closure at each call."""
        self._made_here: set[int] = set()
        """Ids of objects made in forward: their state is nobody's."""
        self._is_on = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def following(self) -> Generator[None]:
        """Learn what the block reads."""
        self._patch(nn.Module)
        for kind in {base for module in self._model.modules() for base in type(module).__mro__}:
            if kind not in (nn.Module, object) and "__getattribute__" in vars(kind):
                self._patch(kind)
        before = sys.gettrace()
        self._is_on = True
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(before)
            self._is_on = False
            for kind, own in reversed(self._patched.items()):
                for name, method in own.items():
                    if method is ABSENT:
                        delattr(kind, name)
                    else:
                        setattr(kind, name, method)
            self._add_cells()
            self._read_wrapped_again()

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Let the block, which is the tracer's own work, read what it wants."""
        if not self._is_on:
            yield
            return
        self._is_on = False
        sys.settrace(None)
        try:
            yield
        finally:
            self._is_on = True
            sys.settrace(self._on_call)

    # -- attributes ----------------------------------------------------------------------------------------------

    def _patch(self, kind: type) -> None:
        if kind in self._patched:
            return
        names = ("__getattribute__", "__setattr__", "__init__")
        own = {name: vars(kind).get(name, ABSENT) for name in names}
        get, put, make = (getattr(kind, name) for name in names)

        def getattribute(obj: Any, name: str) -> Any:
            if name == "__class__":  # isinstance() asks for it, also in here
                return get(obj, name)
            try:
                value = get(obj, name)
            except AttributeError:
                self._on_read(obj, name, ABSENT)
                raise
            self._on_read(obj, name, value)
            return value

        def setattribute(obj: Any, name: str, value: Any) -> None:
            if self._counts(obj):
                self.set_slots.add((id(obj), name))
                self._alive.append(obj)
            put(obj, name, value)

        methods: dict[str, Any] = {"__getattribute__": getattribute, "__setattr__": setattribute}
        if isinstance(make, types.FunctionType):

            @functools.wraps(make)
            def init(obj: Any, *args: Any, **kwargs: Any) -> None:
                if self._counts(obj):
                    self._made_here.add(id(obj))
                    self._alive.append(obj)
                make(obj, *args, **kwargs)

            methods["__init__"] = init
        self._patched[kind] = {name: own[name] for name in methods}
        for name, method in methods.items():
            setattr(kind, name, method)

    def _counts(self, obj: Any) -> bool:
        if not self._is_on or id(obj) in self._made_here or threading.get_ident() != self._thread:
            return False
        return type(obj) is not nn.Module and not type(obj).__module__.startswith("torch.fx")

    def _on_read(self, obj: Any, name: str, value: Any) -> None:
        slot = (id(obj), name)
        if slot in self.found or slot in self.set_slots or not self._counts(obj):
            return
        if isinstance(obj, nn.Module) and (name in torch_internals.MODULE_ATTRIBUTES or name == "training"):
            return
        if name in torch_internals.RNN_CACHES:  # rebuilt from the parameters
            return
        if obj is self._model and name == "forward":  # which fxzero replaces
            return
        with self._muted():
            read = _locate(obj, name, value)
            if read is not None:
                self._add(slot, read)

    @contextlib.contextmanager
    def _muted(self) -> Generator[None]:
        self._is_on, was = False, self._is_on
        try:
            yield
        finally:
            self._is_on = was

    def _add(self, slot: Slot, read: Read) -> None:
        if slot not in self.found:
            self.found[slot] = read
            self._alive.append(read.owner)
            self._follow(read.value)

    def _follow(self, value: Any, depth: int = 3) -> None:
        """Follow the plain objects that a value is or holds."""
        if depth == 0 or id(value) in self._followed or isinstance(value, (*PLAIN, *_BY_IDENTITY, Tensor, nn.Module)):
            return
        self._followed.add(id(value))
        self._alive.append(value)
        if isinstance(value, tuple) or is_container(value):
            self._on_object(value)
            for item in list(value.values() if isinstance(value, dict) else value):
                self._follow(item, depth - 1)
        elif _is_plain_class(type(value)) or isinstance(value, types.SimpleNamespace):
            self._on_object(value)
            if not isinstance(value, types.SimpleNamespace):
                self._patch(type(value))
            for name in vars(value) if isinstance(value, types.SimpleNamespace) else ():  # its class cannot be patched
                self._add((id(value), name), Read(value, name, Kind.ATTRIBUTE, *_held(vars(value)[name])))

    # -- globals and closures ------------------------------------------------------------------------------------

    def _on_call(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not self._is_on or threading.get_ident() != self._thread or not _is_users(code.co_filename):
            return
        with self._muted():
            if code not in self._codes:
                self._codes[code] = []
                self._scan(code, frame.f_globals)
            values = frame.f_locals
            if code.co_freevars:
                held = tuple(id(values.get(name)) for name in code.co_freevars)
                if held not in self._codes[code]:
                    self._codes[code].append(held)
                    self._alive += [values.get(name) for name in code.co_freevars]
                    for name in code.co_freevars:
                        self._follow(values.get(name))
            if code.co_argcount and code.co_varnames[0] == "self":
                if code.co_name in ("__init__", "__post_init__", "__new__"):
                    self._made_here.add(id(values.get("self")))
                    self._alive.append(values.get("self"))
                elif id(values.get("self")) not in self._made_here:  # a method of an object that keeps state
                    self._follow(values.get("self"))

    def _scan(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """Add the globals that code can read, and attributes of the modules and classes among them."""
        chain: Any = None
        for each in dis.get_instructions(code):
            name, owner, chain = each.argval, chain, None
            if each.opname == "LOAD_GLOBAL" and name in space:
                chain = space[name]
                self._add((id(space), name), _global(space, name))
            elif each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if isinstance(owner, types.ModuleType) and _is_users(getattr(owner, "__file__", None) or "<string>"):
                    chain = vars(owner).get(name)
                    if name in vars(owner):
                        self._add((id(vars(owner)), name), _global(vars(owner), name))
                elif isinstance(owner, type) and not name.startswith("__"):
                    base = next((base for base in owner.__mro__ if name in vars(base)), None)
                    if base is not None and base.__module__.split(".")[0] not in _NOT_FOLLOWED:
                        value = vars(base)[name]
                        self._add((id(owner), name), Read(owner, name, Kind.CLASS, *_held(value), owner.__qualname__))
            elif each.opname in ("PRECALL", "CACHE", "EXTENDED_ARG"):
                chain = owner

    def _add_cells(self) -> None:
        """Add the variables of the closures of those functions that ran."""
        codes = {code for code in self._codes if code.co_freevars}
        functions = [each for each in gc.get_referrers(*codes) if isinstance(each, types.FunctionType)] if codes else []
        for function in functions:
            cells = function.__closure__
            if function.__code__ not in codes or not cells:
                continue
            with contextlib.suppress(ValueError):  # an empty cell
                if tuple(id(cell.cell_contents) for cell in cells) not in self._codes[function.__code__]:
                    continue  # another function with this code, which did not run
                for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
                    value = cell.cell_contents
                    if name != "__class__":
                        self._add((id(cell), name), Read(cell, name, Kind.CELL, *_held(value), function.__qualname__))

    def _read_wrapped_again(self) -> None:
        """The tracer replaces functions that are marked by `torch.fx.wrap` in their modules while it runs."""
        for slot, read in self.found.items():
            if read.kind is Kind.GLOBAL and callable(read.value) and callable(read.owner.get(read.name)):
                self.found[slot] = _global(read.owner, read.name)


def _held(value: Any) -> tuple[Any, Any]:
    return value, content_of(value)


def _global(space: dict[str, Any], name: str) -> Read:
    return Read(space, name, Kind.GLOBAL, *_held(space[name]), str(space.get("__name__", "")))


def _locate(obj: Any, name: str, value: Any) -> Read | None:
    """Where an attribute was found; None if it needs no guard of its own."""
    if name.startswith("__") and name.endswith("__"):
        return None
    try:
        attributes: dict[str, Any] | None = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        attributes = None
    if attributes is not None:
        name = name if name in attributes else getattr(type(obj), "attribute_map", {}).get(name, name)
        if name in attributes:
            return Read(obj, name, Kind.ATTRIBUTE, *_held(attributes[name]))
    for base in type(obj).__mro__:
        if name not in vars(base):
            continue
        found = vars(base)[name]
        if base in (nn.Module, object):
            return None
        if isinstance(found, types.MemberDescriptorType):
            return Read(obj, name, Kind.COMPUTED, *_held(value))
        if isinstance(found, property) or hasattr(type(found), "__set__"):
            return None  # what its code reads is seen
        return Read(obj, name, Kind.CLASS, *_held(found))
    if isinstance(obj, nn.Module) and any(name in table for table in torch_internals.registered(obj)):
        return None
    return Read(obj, name, Kind.ABSENT if value is ABSENT else Kind.COMPUTED, *_held(value))
