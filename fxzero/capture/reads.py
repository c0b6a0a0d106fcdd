"""Learns which Python state a forward reads while it is traced: attributes, globals, and variables of closures.

Attributes are seen by a `__getattribute__` that nn.Module itself has during the trace, as has the class of each plain
object (a config, a user's class) that a read returned. No object changes its class. Globals and cells are taken from
the code objects that run, at their call; only those of the user's files count, not of torch or the standard library.

    with reads.following(): output = model(...)
    reads.found                     # each slot that was read before it was written, with what it held then
"""

import collections
import contextlib
import contextvars
import copyreg
import enum
import functools
import gc
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.code.named_by_code import NamedByCode, function_of, of_global, of_module
from fxzero.capture.code.users_code import is_followed_file, is_guarded_class, is_plain_class, is_users_module
from fxzero.capture.places import ClassAttributes, value_of, variable_in
from fxzero.capture.slots import ABSENT, PLAIN, Kind, Read, Slot, behind_proxy, class_with, held, is_container
from fxzero.host.gc_pause import gc_paused

_BY_IDENTITY = (
    type, enum.Enum, property, functools.partial, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
    types.ModuleType, types.MethodWrapperType,
)  # fmt: skip
_COMPREHENSIONS = ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>")
"""Names of code."""
_OF_LIBRARY = (
    types.SimpleNamespace, collections.UserDict, collections.UserList, collections.ChainMap, threading.local,
)  # fmt: skip
"""Plain objects whose attributes are all followed."""
_DEPTH = 64
"""Levels of containers in containers that are followed."""
_NAMES_OF_CLASSES = frozenset({"type", "__class__", "super", "cls"})
"""Names that code has which reads attributes of a class."""
_SIZE = "the number of attributes"
_OF_MODULES = frozenset({*torch_internals.MODULE_ATTRIBUTES, "training"})
"""Attributes of modules that are guarded otherwise."""
_made_in_forwards: weakref.WeakSet[types.FunctionType] = weakref.WeakSet()
"""Functions that a forward made which was followed; others keep their variables from call to call."""


class _InClass(enum.Enum):
    """What a class says of an attribute."""

    FREE = "of nn.Module, or a property: no guard"
    LACKS = "nothing, and it is a module's"
    UNKNOWN = "anything else"


class ReadsMoment(NamedTuple):
    """What was known at some time of a forward."""

    found: dict[Slot, Read]
    set_slots: set[Slot]
    codes: dict[types.CodeType, list[tuple[int, ...]]]


class Reads:
    """What one forward reads, and the attributes that it sets."""

    def __init__(
        self,
        model: nn.Module,
        on_object: Callable[[Any], None],
        on_store: Callable[[dict[Any, Any], str, str], None],
        alive: list[Any],
    ) -> None:
        """
        Args:
            model: its `forward` is not its own during a trace.
            on_object: called with each plain object and container the first time it is met.
            on_store: called with the dict, the key and the name of each global, variable of a closure, or attribute of
                a class or module, that code may set which is about to run.
            alive: receives objects, so that no id is given again during the trace.
        """
        self.found: dict[Slot, Read] = {}
        self.replaced: frozenset[int] = frozenset()
        """Ids of modules whose forward is not their own during a trace, beside the model."""
        self.set_slots: set[Slot] = set()
        """Attributes that were set."""
        self.num_bound = 0
        """Times that a parameter, a buffer or a submodule was set."""
        self.observed: dict[Any, int] = {}
        """Maps slots, and ids of containers, that hooks change for which this is no trace, to the ids of the hooks."""
        self.conflicts: set[int] = set()
        """The hooks among them whose changes the forward reads, or makes too."""
        self._settled: set[Slot] = set()
        """Slots of which nothing is learnt any more: they are found, or were set, or need no guard."""
        self._behind: Reads | None = None
        """What another forward has met, to be taken over."""
        self._seen: set[Any] | None = None
        self.in_backward: set[Any] | None = None
        """Slots, and ids of values of globals and of variables of closures, that code in backward reads."""
        self._model, self._on_object, self._on_store = model, on_object, on_store
        self._alive = alive
        self._followed: set[int] = set()
        self._patched: dict[type, dict[str, Any]] = {}
        self._codes: dict[types.CodeType, list[tuple[int, ...]]] = {}
        """Code that ran, and the ids of the variables of its closure at each call."""
        self._incomplete: list[tuple[types.CodeType, dict[str, Any]]] = []
        """Code that was about to import a module for the first time, and its globals."""
        self._methods: dict[types.CodeType, bool] = {}
        """Whether code that was found in a class or a module may be a method."""
        self._stored: dict[types.CodeType, set[str]] = {}
        """The variables of its closure that code sets."""
        self._made_here: set[int] = set()
        """Ids of objects made in forward: their state is nobody's."""
        self.met: list[Any] = []
        """Values that were followed."""
        self._stores: list[tuple[dict[Any, Any], str, str]] = []
        """What `on_store` was called with."""
        self._known_calls: dict[types.CodeType, int] = {}
        """How many calls of code another forward had met before."""
        self._classes_named: dict[types.CodeType, bool] = {}
        """Whether code may read attributes of the class of its first argument, as `type(self).count`."""
        self._classes_read: set[tuple[types.CodeType, type]] = set()
        """Code that may do so, and classes of which it has."""
        self._in_classes: dict[tuple[type, str], _InClass] = {}
        """What classes know of attributes that their instances have not set."""
        self._with_functions: set[types.CodeType] = set()
        """Code that functions have which were there before the forward."""
        self._is_on = False
        self._thread = threading.get_ident()
        self._on_event: Callable[[types.FrameType, str, Any], None] | None = None

    def add_made(self, objects: Sequence[Any]) -> None:
        """Objects that were made for this forward, whose state is nobody's."""
        self._made_here.update(map(id, objects))
        self._alive += objects

    def begin_behind(self, other: "Reads") -> None:
        """Take over what another forward of the model has met: what is found beyond that, it has not read.

        Called before anything is followed.
        """
        self._behind = other

    def _take_over(self, other: "Reads") -> None:
        for slot, read in other.found.items():
            self._add(slot, read)
        self._settled |= other._settled - other.set_slots
        self._alive += other._alive
        for value in other.met:
            self._follow(value)
        for store in other._stores:
            self._on_store(*store)
        self._codes = {code: [*calls] for code, calls in other._codes.items()}
        made_anew = [code for code in self._codes if code.co_freevars and code not in other._with_functions]
        self._known_calls = {code: len(calls) for code, calls in self._codes.items()}
        self._known_calls |= dict.fromkeys(made_anew, sys.maxsize)
        self._methods, self._stored = dict(other._methods), dict(other._stored)
        self._classes_named, self._classes_read = dict(other._classes_named), set(other._classes_read)

    @contextlib.contextmanager
    def following(self) -> Generator[None]:
        """Learn what the block reads."""
        if self._is_on:
            yield
            return
        with gc_paused():  # callbacks of the collector are no part of the model
            gc.collect(0)  # from here on, the youngest objects are those of the forward
            try:
                with self._patches():
                    if self._behind is not None:
                        self._take_over(self._behind)
                        self._behind = None
                    with self._calls():
                        yield
            finally:
                for code, space in list(self._incomplete):  # it has imported what was missing
                    self._scan(code, space)
                self._add_cells()
                self._read_wrapped_again()

    @contextlib.contextmanager
    def trial(self) -> Generator[set[Any]]:
        """Note the slots, and the ids of containers, that the block reads. What it sets is no conflict."""
        outer, self._seen = self._seen, set()
        try:
            yield self._seen
        finally:
            self._seen = outer

    @property
    def is_in_trial(self) -> bool:
        """True while the block of a trial runs."""
        return self._seen is not None

    @property
    def _notes(self) -> bool:
        """True while somebody wants to know which slots are read."""
        return self._seen is not None or self.in_backward is not None or bool(self.observed)

    def read_in_backward(self) -> list[Read]:
        """What code in backward reads of values that may change until it runs: numbers, tensors, containers."""
        noted, found = self.in_backward or set(), self.found
        return [
            read
            for slot, read in found.items()
            if (slot in noted or (read.kind is Kind.CELL and id(read.value) in noted)) and _may_change(read)
        ]

    def now(self) -> ReadsMoment:
        """What is known now."""
        codes = {code: list(calls) for code, calls in self._codes.items()}
        return ReadsMoment(dict(self.found), set(self.set_slots), codes)

    def go_back_to(self, then: ReadsMoment) -> None:
        """Forget what was learnt since some time."""
        self.found, self.set_slots, self._codes = dict(then.found), set(then.set_slots), then.codes
        self._settled.clear()

    def _touch(self, *keys: Any) -> None:
        """Code reads or sets slots, or meets containers."""
        if not self._is_on or threading.get_ident() != self._thread:
            return
        if self._seen is not None:
            self._seen.update(keys)
            return
        if self.in_backward is not None:
            self.in_backward.update(keys)
        if self.observed:
            self.conflicts.update(self.observed[key] for key in keys if key in self.observed)

    @contextlib.contextmanager
    def _patches(self) -> Generator[None]:
        """See attributes that are read and set in the block."""
        self._patch(nn.Module)
        for kind in {base for module in self._model.modules() for base in type(module).__mro__}:
            if kind not in (nn.Module, object) and "__getattribute__" in vars(kind):
                self._patch(kind)
        try:
            with patch.object(copyreg, "__newobj__", self._noted(copyreg.__newobj__)):  # type: ignore[attr-defined]
                yield
        finally:
            patched, self._patched = self._patched, {}
            for kind, own in reversed(patched.items()):
                for name, method in own.items():
                    if method is ABSENT:
                        delattr(kind, name)
                    else:
                        setattr(kind, name, method)

    def _noted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """What makes copies of objects (copy.copy, copy.deepcopy), and notes that they are made here."""

        @functools.wraps(make)
        def newobj(*args: Any) -> Any:
            obj = make(*args)
            if self._is_on:
                self._made_here.add(id(obj))
                self._alive.append(obj)
            return obj

        return newobj

    @contextlib.contextmanager
    def _calls(self) -> Generator[None]:
        """See the code that runs in the block."""
        before, self._on_event = sys.gettrace(), _users_calls(self._on_call)
        self.go_on()
        try:
            yield
        finally:
            sys.settrace(before)
            self._is_on, self._on_event = False, None  # which would hold this object in a cycle

    def pause(self) -> bool:
        """See nothing until `go_on`: the tracer's own work follows, which reads what it wants.

        Returns:
            Whether anything was seen before.
        """
        if not self._is_on:
            return False
        self._is_on = False
        sys.settrace(None)
        return True

    def go_on(self) -> None:
        """See reads and calls from now on."""
        self._is_on = True
        sys.settrace(self._on_event)

    def unseen(self, function: Callable[..., object]) -> Callable[..., object]:
        """The same function, but what it reads and calls is not seen: it is the tracer's own."""

        @functools.wraps(function)
        def run(*args: Any) -> object:
            is_seen = self.pause()
            try:
                return function(*args)
            finally:
                if is_seen:
                    self.go_on()

        return run

    # -- attributes ----------------------------------------------------------------------------------------------

    def _patch(self, kind: type) -> None:
        if kind in self._patched:
            return
        names = ("__getattribute__", "__setattr__", "__init__")
        own = {name: vars(kind).get(name, ABSENT) for name in names}
        unread = _OF_MODULES if issubclass(kind, nn.Module) else frozenset[str]()
        get, put, make = (getattr(kind, name) for name in names)
        settled = self._settled

        def getattribute(obj: Any, name: str) -> Any:
            if name == "__class__":  # isinstance() asks for it, also in here
                return get(obj, name)
            try:
                value = get(obj, name)
            except AttributeError:
                if self._notes or (self._is_on and (id(obj), name) not in settled):
                    self._on_read(obj, name, ABSENT)
                raise
            is_known = not self._is_on or name in unread or (id(obj), name) in settled
            if is_known and not self._notes:
                return value
            if name == "__dict__" and self._is_on and _is_called_by_user(inspect.currentframe()):
                self._on_read_of_all(obj, value)
            self._on_read(obj, name, value)
            return value

        def setattribute(obj: Any, name: str, value: Any) -> None:
            if self._counts(obj):
                self._touch((id(obj), name))
                self.set_slots.add((id(obj), name))
                self._alive.append(obj)
                if isinstance(obj, nn.Module):
                    self.num_bound += any(name in table for table in torch_internals.registered(obj))
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
        if self._notes:
            self._touch(slot, id(value))
        if not self._counts(obj):
            return
        if name != "__dict__":
            self._settled.add(slot)
            self._alive.append(obj)
        if slot in self.found or slot in self.set_slots or self._needs_no_guard(obj, name, value):
            return
        self.pause()  # Python is slow where calls are seen
        try:
            if (read := _locate(obj, name, value)) is not None:
                self._add(slot, read)
        finally:
            self.go_on()

    def _needs_no_guard(self, obj: Any, name: str, value: Any) -> bool:
        if self._is_free(obj, name, value) or (isinstance(obj, nn.Module) and name in _OF_MODULES):
            return True
        if name in torch_internals.RNN_CACHES:  # rebuilt from the parameters
            return True
        return name == "forward" and (obj is self._model or id(obj) in self.replaced)  # which fxzero replaces

    def _is_free(self, obj: Any, name: str, value: Any) -> bool:
        """True for a method of nn.Module, a property, or what a module registers: `_locate` would find it in vain."""
        kind = type(obj)
        found = self._in_classes.get((kind, name))
        if found is None:
            found = self._in_classes[kind, name] = _found_in(kind, name)
        if found is _InClass.UNKNOWN:
            return False
        attributes = object.__getattribute__(obj, "__dict__")
        if name in attributes:
            return False
        if found is _InClass.FREE:
            return True
        return value is ABSENT and any(name in attributes.get(table, ()) for table in torch_internals.TABLES)

    def _on_read_of_all(self, obj: Any, attributes: dict[str, Any]) -> None:
        for name, value in list(attributes.items()):
            self._on_read(obj, name, value)
        if not isinstance(obj, nn.Module) and self._counts(obj):
            self._add((id(attributes), _SIZE), _size_of(attributes, type(obj).__qualname__))

    @contextlib.contextmanager
    def muted(self) -> Generator[None]:
        """See nothing in the block."""
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
            if read.kind is Kind.ATTRIBUTE and is_users_module(read.value):
                for each in of_module(vars(read.value)):
                    self._add((id(each.owner), each.name), each)

    def follow(self, value: Any) -> None:
        """Follow an object that a forward will meet, such as a hook."""
        with self.muted():
            self._follow(value)

    def _follow(self, value: Any, depth: int = _DEPTH) -> None:
        """Follow the plain objects that a value is or holds."""
        if depth == 0 or id(value) in self._followed or isinstance(value, (*PLAIN, Tensor, nn.Module)):
            return
        self._followed.add(id(value))
        self._alive.append(value)
        self.met.append(value)
        if isinstance(value, tuple) or is_container(value):
            self._on_object(value)
            for item in list(value.values() if isinstance(value, dict) else value):
                self._follow(item, depth - 1)
        elif isinstance(value, functools.partial):
            if not getattr(value.func, "__module__", "").startswith("fxzero."):
                self._follow(value.func)
                for name in ("args", "keywords"):  # cannot be set, but what they hold can
                    self._add((id(value), name), Read(value, name, Kind.COMPUTED, *held(getattr(value, name))))
        elif isinstance(value, types.MethodType):
            self._follow(value.__self__, depth)
        elif isinstance(value, types.FunctionType) and is_followed_file(value.__code__.co_filename):
            self._follow_function(value)
        elif isinstance(value, weakref.ReferenceType):
            self._follow(value(), depth)
        elif isinstance(value, types.MappingProxyType):
            self._follow(behind_proxy(value), depth)
        elif isinstance(value, weakref.ProxyTypes) and is_plain_class(value.__class__):
            self._patch(value.__class__)
        elif isinstance(value, contextvars.ContextVar):
            place = value_of(value)
            if value.name in place:
                read = Read(place, value.name, Kind.GLOBAL, *held(place[value.name]), "context variable")
                self._add((id(place), value.name), read)
        elif isinstance(value, _OF_LIBRARY):  # their classes cannot be patched
            self._on_object(value)
            self._add((id(vars(value)), _SIZE), _size_of(vars(value), type(value).__qualname__))
            for name, each in vars(value).items():
                self._add((id(value), name), Read(value, name, Kind.ATTRIBUTE, *held(each)))
        elif not isinstance(value, _BY_IDENTITY) and is_plain_class(type(value)):
            self._on_object(value)
            self._patch(type(value))

    def add_class_writes(self, before: Mapping[Slot, tuple[ClassAttributes, Any]]) -> None:
        """Add attributes of classes that forward set, since `type(self).count += 1` is not seen to read them.

        Args:
            before: the class, and what it held before the forward, of each attribute.
        """
        for slot, read in list(self.found.items()):
            if read.kind is Kind.CLASS and not torch_internals.is_symbolic(read.value):
                _, value = before.get((id(read.place), read.name), (None, read.value))
                if value is not read.value:
                    self.found[slot] = replace(read, value=value, content=None)
        for (_, name), (attributes, value) in before.items():
            kind = attributes.kind
            self._add((id(kind), name), Read(kind, str(name), Kind.CLASS, value, None, kind.__qualname__))

    # -- globals and closures ------------------------------------------------------------------------------------

    def _on_call(self, frame: types.FrameType) -> None:
        """Code of the user is about to run."""
        code = frame.f_code
        if not self._is_on or threading.get_ident() != self._thread:
            return
        if self._notes:
            self._touch_names(frame)
        with self.muted():
            if code not in self._codes:
                self._codes[code] = []
                self._scan(code, frame.f_globals)
                if (function := function_of(frame)) is not None:
                    self._methods[code] = code.co_argcount > 0
                    self._follow(function)
            values = frame.f_locals
            if self._classes_named[code]:
                self._add_of_class(code, values.get(code.co_varnames[0]))
            if code.co_freevars:
                held = tuple(id(values.get(name)) for name in code.co_freevars)
                if held not in self._codes[code]:
                    self._codes[code].append(held)
                    self._alive += [values.get(name) for name in code.co_freevars]
                    for name in code.co_freevars:
                        if id(values.get(name)) not in self._made_here:
                            self._follow(values.get(name))
                    if self._stored[code]:
                        self._add_stored_cells(frame, held)
            if self._methods.get(code) or (code.co_argcount and code.co_varnames[0] == "self"):
                first = values.get(code.co_varnames[0])
                if code.co_name in ("__init__", "__post_init__", "__new__"):
                    self._made_here.add(id(first))
                    self._alive.append(first)
                elif id(first) not in self._made_here and hasattr(type(first), code.co_name):
                    self._follow(first)  # an object that keeps state

    def _touch_names(self, frame: types.FrameType) -> None:
        """Code is about to run that may read globals and variables of its closure."""
        code, space, values = frame.f_code, frame.f_globals, frame.f_locals
        self._touch(*((id(space), name) for name in code.co_names), *(id(space.get(name)) for name in code.co_names))
        self._touch(*(id(values.get(name)) for name in code.co_freevars))

    def _scan(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """Add what code names that is about to run, and note what it sets."""
        named = NamedByCode(code, space)
        for read in named.reads:
            self._add((id(read.owner), read.name), read)
        for store in named.stores:
            self._on_store(*store)
            self._stores.append(store)
        self._stored[code] = named.cells
        self._classes_named[code] = code.co_argcount > 0 and not _NAMES_OF_CLASSES.isdisjoint(
            (code.co_varnames[0], *code.co_names, *code.co_freevars)
        )
        if not named.is_complete:
            self._incomplete.append((code, space))

    def _add_of_class(self, code: types.CodeType, first: Any) -> None:
        """Add the attributes of the class of a method's first argument that the method may read from that class."""
        kind = first if isinstance(first, type) else type(first)
        if (code, kind) in self._classes_read:
            return
        self._classes_read.add((code, kind))
        for name in code.co_names:
            for base in kind.__mro__ if class_with(kind, name) is not None else ():
                value = vars(base).get(name, ABSENT)
                if base not in (nn.Module, object) and is_guarded_class(base) and _is_of_class(name, value):
                    self._add((id(base), name), Read(base, name, Kind.CLASS, *held(value), base.__qualname__))

    def _follow_function(self, function: types.FunctionType) -> None:
        """Add the code, the default arguments and the attributes of a function."""
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            if value is not None or name == "__defaults__":
                self._add((id(function), name), Read(function, name, Kind.FUNCTION, *held(value)))
        if vars(function):
            self._on_object(function)
        for name, value in vars(function).items():
            if not name.startswith("__"):
                self._add((id(function), name), Read(function, name, Kind.ATTRIBUTE, *held(value), function.__name__))

    def _add_cells(self) -> None:
        """Add the variables of the closures of those functions that ran, and set none of them."""
        codes = {code for code in self._codes if code.co_freevars and not self._stored[code] and self._new_calls(code)}
        functions = _functions_with(codes)
        made_here = set(map(id, functions)).intersection(map(id, gc.get_objects(generation=0) if functions else ()))
        _made_in_forwards.update(each for each in functions if id(each) in made_here)
        self._with_functions |= {each.__code__ for each in functions if each not in _made_in_forwards}
        for function in functions:
            for name, cell in _cells(function, self._new_calls(function.__code__)):
                self._add_cell(function, name, cell)

    def _new_calls(self, code: types.CodeType) -> list[tuple[int, ...]]:
        """The calls of code that no forward before has met."""
        return self._codes[code][self._known_calls.get(code, 0) :]

    def _add_stored_cells(self, frame: types.FrameType, held: tuple[int, ...]) -> None:
        """Add the variables of the closure of a function that is about to run, and that sets some of them."""
        code = frame.f_code
        for function in _functions_with({code}):
            for name, cell in _cells(function, [held]):
                if not _is_of_caller(frame, name, cell.cell_contents):
                    self._add_cell(function, name, cell)
                    if name in self._stored[code]:
                        self._on_store(variable_in(cell), name, f"{name} (of the closure of {function.__qualname__})")

    def _add_cell(self, function: types.FunctionType, name: str, cell: types.CellType) -> None:
        place = variable_in(cell)
        self._add((id(place), name), Read(place, name, Kind.CELL, *held(cell.cell_contents), function.__qualname__))

    def _read_wrapped_again(self) -> None:
        """The tracer replaces functions that are marked by `torch.fx.wrap` in their modules while it runs."""
        for slot, read in self.found.items():
            if read.kind is Kind.GLOBAL and callable(read.value) and callable(read.owner.get(read.name)):
                self.found[slot] = of_global(read.owner, read.name)


def _users_calls(on_call: Callable[[types.FrameType], None]) -> Callable[[types.FrameType, str, Any], None]:
    """A function for `sys.settrace` that calls another one for code of the user; others take as little as can be."""
    others: set[str] = set()

    def on_event(frame: types.FrameType, event: str, argument: Any) -> None:
        filename = frame.f_code.co_filename
        if filename in others:
            return
        if is_followed_file(filename):
            on_call(frame)
        else:
            others.add(filename)

    return on_event


def _functions_with(codes: Collection[types.CodeType]) -> list[types.FunctionType]:
    """The functions that have one of some codes; none for those of comprehensions, whose functions are gone."""
    codes = {code for code in codes if code.co_name not in _COMPREHENSIONS and code.co_freevars != ("__class__",)}
    referrers = gc.get_referrers(*codes) if codes else []  # looks at every object of the process
    return [each for each in referrers if isinstance(each, types.FunctionType) and each.__code__ in codes]


def _cells(function: types.FunctionType, calls: Collection[tuple[int, ...]]) -> list[tuple[str, types.CellType]]:
    """The variables of a function's closure by name; none if it is another than those that were called.

    Args:
        calls: the ids of what the variables held at each call.
    """
    cells = function.__closure__ or ()
    with contextlib.suppress(ValueError):  # an empty cell
        if tuple(id(cell.cell_contents) for cell in cells) in calls:
            named = zip(function.__code__.co_freevars, cells, strict=True)
            return [(name, cell) for name, cell in named if name != "__class__"]
    return []


def _is_of_caller(frame: types.FrameType | None, name: str, value: Any) -> bool:
    """True if a variable belongs to a function that is running: it is made anew in each call."""
    while frame is not None:
        if name in frame.f_code.co_cellvars and frame.f_locals.get(name) is value:
            return True
        frame = frame.f_back
    return False


def _is_called_by_user(frame: types.FrameType | None) -> bool:
    """True if the caller of a running function is code of the user."""
    caller = None if frame is None else frame.f_back
    return caller is not None and is_followed_file(caller.f_code.co_filename)


def _is_of_class(name: str, value: Any) -> bool:
    """True for an attribute of a class that is a value, no method and nothing of Python's own."""
    is_code = callable(value) or isinstance(value, (staticmethod, classmethod)) or hasattr(type(value), "__set__")
    return value is not ABSENT and not name.startswith("__") and not is_code


def _may_change(read: Read) -> bool:
    """True for a slot whose value code sets as it runs, as opposed to functions, modules and the like."""
    value = read.value
    is_value = isinstance(value, (*PLAIN, tuple, Tensor, np.ndarray, np.generic)) or is_container(value)
    return read.place is not None and (is_value or torch_internals.is_symbolic(value))


def _size_of(attributes: dict[str, Any], name: str) -> Read:
    return Read(attributes, _SIZE, Kind.SIZE, len(attributes), path=name)


def _found_in(kind: type, name: str) -> _InClass:
    if hasattr(kind, "attribute_map") or kind.__dictoffset__ == 0 or (name.startswith("__") and name.endswith("__")):
        return _InClass.UNKNOWN
    base = class_with(kind, name)
    if base is None:
        return _InClass.LACKS if issubclass(kind, nn.Module) else _InClass.UNKNOWN
    found = vars(base)[name]
    is_slot = isinstance(found, types.MemberDescriptorType)
    is_code = not is_slot and (isinstance(found, property) or hasattr(type(found), "__set__"))
    return _InClass.FREE if base in (nn.Module, object) or is_code else _InClass.UNKNOWN


def _locate(obj: Any, name: str, value: Any) -> Read | None:
    """Where an attribute was found; None if it needs no guard of its own."""
    if (name.startswith("__") and name.endswith("__")) or name == torch_internals.CALL:
        return None
    try:
        attributes: dict[str, Any] | None = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        attributes = None
    if attributes is not None:
        name = name if name in attributes else getattr(type(obj), "attribute_map", {}).get(name, name)
        if name in attributes:
            return Read(obj, name, Kind.ATTRIBUTE, *held(attributes[name]))
    for base in type(obj).__mro__:
        if name not in vars(base):
            continue
        found = vars(base)[name]
        if base in (nn.Module, object):
            return None
        if isinstance(found, types.MemberDescriptorType):
            return Read(obj, name, Kind.SLOT if value is not ABSENT else Kind.ABSENT, *held(value))
        if isinstance(found, property) or hasattr(type(found), "__set__"):
            return None  # what its code reads is seen
        return Read(obj, name, Kind.CLASS, *held(found))
    if isinstance(obj, nn.Module) and any(name in table for table in torch_internals.registered(obj)):
        return None
    return Read(obj, name, Kind.ABSENT if value is ABSENT else Kind.COMPUTED, *held(value))
