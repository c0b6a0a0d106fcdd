"""Says whether the Python state that a plan was traced for is there: one generated function per plan.

A guard tests the identity of what a slot holds; only where that fails, whether it is equal for every computation (the
same type, for floats the same bits). The source of the function has names that fxzero makes, never names or values of
the user.

    guards.hold()        microseconds for hundreds of modules
    guards.failed()      the labels of guards that do not hold; slow
"""

import operator
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.code.users_code import is_guarded_class
from fxzero.capture.places import ItemsIn, attributes_of, items_in, names_of_slots, slots_of
from fxzero.capture.slots import (
    ABSENT,
    BUFFERS,
    PLAIN,
    Kind,
    Read,
    Slot,
    behind_proxy,
    class_with,
    content_of,
    is_container,
)  # fmt: skip
from fxzero.errors import CaptureError

_DEPTH = 64
"""Levels of containers in containers that are guarded."""
_MAX_NAMED = 4
"""Entries of a dict that are guarded one by one; larger dicts as a whole."""

_call_of: Callable[[type], Any] = operator.attrgetter("__call__")


def same(now: Any, then: Any) -> bool:
    """True if two values are equal for every computation: type, sign of zero, bits of NaN."""
    if now is then:
        return True
    if type(now) is not type(then):
        return False
    if isinstance(now, float):
        return struct.pack("d", now) == struct.pack("d", then)
    if isinstance(now, (tuple, list)):
        return len(now) == len(then) and all(map(same, now, then))
    if isinstance(now, (*PLAIN, np.generic)):
        return bool(now == then)
    if isinstance(now, types.MethodType):
        return now.__func__ is then.__func__ and now.__self__ is then.__self__
    return False


def _same_content(now: Any, then: Any) -> bool:
    if isinstance(now, np.ndarray):
        return now.dtype == then.dtype and now.tobytes() == then.tobytes()
    return bool(content_of(now) == then)


def same_geometry(now: Any, then: Tensor) -> bool:
    """True if a tensor can take the place of another one in a graph."""
    return isinstance(now, Tensor) and (now.shape, now.stride(), now.dtype, now.device, now.requires_grad) == (
        then.shape, then.stride(), then.dtype, then.device, then.requires_grad
    )  # fmt: skip


class Guards:
    """The guards of one plan."""

    def __init__(self, model: nn.Module, reads: Iterable[Read], inputs: Mapping[Slot, Any]) -> None:
        """
        Args:
            reads: what the forward read.
            inputs: slots whose values are inputs of the graph, and what they held: a tensor, whose geometry is guarded,
                or a number, whose type is.
        """
        self._space: dict[str, Any] = {
            "same": same, "same_content": _same_content, "same_geometry": same_geometry, "is_": operator.is_,
            "call_of": _call_of,
        }  # fmt: skip
        self._names: dict[int, str] = {}
        self._attributes: dict[type, Mapping[str, Any]] = {}
        """Views of the attributes of classes."""
        self._terms: dict[str, str] = {}
        """Maps each test to its label."""
        self._contents: set[int] = set()
        """Ids of the containers whose content is guarded."""
        self._inputs = inputs
        self._with_inputs = {owner for owner, _ in inputs}
        """Ids of what holds inputs."""
        self._paths = _paths(model, reads)
        self.values: dict[str, Any] = {}
        """Maps the label of each guarded slot to what it must hold."""
        for read in reads:
            label = self.label(read)
            _check_iterator(read, label)
            if not _holds_fake(read.value) and not _holds_fake(read.content):
                for term in self._of_read(read):
                    self._terms.setdefault(term, label)
                    if read.kind not in (Kind.FUNCTION, Kind.SIZE):
                        self.values[label] = read.value
        self._terms.setdefault(self._of_functions(reads), "the code of a function, or its default arguments")
        for term, label in self._of_modules(model):
            self._terms.setdefault(term, label)
        self.hold = self._compile()

    def failed(self) -> list[str]:
        """The labels of the guards that do not hold, each once."""
        failed = [label for term, label in self._terms.items() if not self._holds(term)]
        return list(dict.fromkeys(failed))

    def __str__(self) -> str:
        lines = (f"{label} {_text(value)}" for label, value in self.values.items())
        return "\n".join(lines) or "no Python state is read"

    # -- the generated function ----------------------------------------------------------------------------------

    def _compile(self) -> Any:
        terms = list(self._terms)
        parameters = ", ".join(f"{name}={name}" for name in self._names.values())
        lines = [f"def hold({parameters}):", "  try:"]
        lines += [f"    if not ({' and '.join(terms[i : i + 50])}): return False" for i in range(0, len(terms), 50)]
        lines += ["    return True", "  except (KeyError, IndexError, AttributeError, ValueError): return False"]
        exec(compile("\n".join(lines), "<fxzero guards>", "exec"), self._space)
        return self._space["hold"]

    def _holds(self, term: str) -> bool:
        try:
            return bool(eval(term, self._space))
        except (KeyError, IndexError, AttributeError, ValueError):
            return False

    def _name(self, value: Any) -> str:
        """The name that stands for an object in the generated source, which also keeps the object alive."""
        name = self._names.setdefault(id(value), f"c{len(self._names)}")
        self._space[name] = value
        return name

    # -- what is tested ------------------------------------------------------------------------------------------

    def _of_read(self, read: Read) -> Iterator[str]:
        owner, name = read.owner, read.name
        if read.kind is Kind.ABSENT:
            yield from self._of_absent(owner, name)
            return
        if read.kind is Kind.ATTRIBUTE:
            yield from self._of_entry(vars(owner), name, read.value, read.content)
        elif read.kind is Kind.FUNCTION:
            yield from self._of_content(read.value, read.content, 1) if is_container(read.value) else ()
            for value in read.value if isinstance(read.value, tuple) else ():
                yield from self._of_content(value, content_of(value), _DEPTH) if is_container(value) else ()
        elif read.kind is Kind.SIZE:
            yield f"len({self._name(owner)}) == {read.value}"
        elif read.kind is Kind.SLOT:
            yield from self._of_entry(slots_of(owner), name, read.value, read.content)
        elif read.kind in (Kind.GLOBAL, Kind.CELL):
            yield from self._of_entry(owner, name, read.value, read.content)
        elif read.kind is Kind.CLASS:
            if hasattr(owner, "__dict__") and not isinstance(owner, type):
                yield f"{name!r} not in {self._name(vars(owner))}"
            yield from self._of_class(owner if isinstance(owner, type) else type(owner), name, read)
        else:
            yield from self._of_value(f"getattr({self._name(owner)}, {name!r})", read.value, read.content)

    def _of_absent(self, owner: Any, name: str) -> Iterator[str]:
        """That an object has no attribute, that its class has none, and that a module registers nothing so."""
        if name in names_of_slots(type(owner)):
            yield f"{name!r} not in {self._name(slots_of(owner))}"
            return
        if hasattr(owner, "__dict__"):
            yield f"{name!r} not in {self._name(vars(owner))}"
        for table in torch_internals.registered(owner) if isinstance(owner, nn.Module) else ():
            yield f"{name!r} not in {self._name(table)}"
        for kind in type(owner).__mro__:
            if is_guarded_class(kind) and kind not in (nn.Module, object) and name not in vars(kind):
                yield f"{name!r} not in {self._name_of_attributes(kind)}"

    def _of_class(self, kind: type, name: str, read: Read) -> Iterator[str]:
        """That a class has an attribute, and none of those between it and the class that has it."""
        base = class_with(kind, name)
        if base is None:
            return
        for nearer in kind.__mro__[: kind.__mro__.index(base)]:
            yield f"{name!r} not in {self._name_of_attributes(nearer)}"
        if (id(attributes_of(base)), name) in self._inputs:
            yield from self._of_entry(attributes_of(base), name, read.value, read.content)
        else:
            yield from self._of_value(f"{self._name_of_attributes(base)}[{name!r}]", read.value, read.content)

    def _name_of_attributes(self, kind: type) -> str:
        """The name that stands for the `__dict__` of a class, of which Python makes a new view each time."""
        return self._name(self._attributes.setdefault(kind, kind.__dict__))

    def _of_functions(self, reads: Iterable[Read]) -> str:
        """That all functions have the same code and default arguments."""
        of_functions = [read for read in reads if read.kind is Kind.FUNCTION]
        columns = ([r.owner for r in of_functions], [r.name for r in of_functions], [r.value for r in of_functions])
        owners, names, values = (self._name(tuple(column)) for column in columns)
        return f"all(map(is_, map(getattr, {owners}, {names}), {values}))"

    def _of_entry(
        self, owner: dict[Any, Any], key: Any, value: Any, content: Any, depth: int = _DEPTH
    ) -> Iterator[str]:
        now = f"{self._name(owner)}[{key!r}]" if type(key) in (str, int) else f"{self._name(owner)}[{self._name(key)}]"
        given = self._inputs.get((id(owner), key), ABSENT)
        items = items_in(owner, key) if isinstance(value, (tuple, list, dict)) else None
        if items is not None and id(items) in self._with_inputs:
            yield from self._of_items(now, items, value, content, depth)
        elif given is ABSENT:
            yield from self._of_value(now, value, content, depth)
        elif isinstance(given, Tensor):
            yield f"({now} is {self._name(given)} or same_geometry({now}, {self._name(given)}))"
        else:
            yield f"type({now}) is {self._name(type(given))}"

    def _of_items(self, now: str, items: ItemsIn, value: Any, content: Any, depth: int) -> Iterator[str]:
        """That a tuple, list or dict, which may be another each time, has items in the place of those that it had."""
        is_dict = isinstance(content, dict)
        yield f"type({now}) is {self._name(type(value))}"
        yield f"{now}.keys() == {self._name(set(content))}" if is_dict else f"len({now}) == {len(content)}"
        for key, each in cast("Mapping[Any, Any]", content).items() if is_dict else enumerate(content):
            yield from self._of_entry(items, key, each, content_of(each), depth - 1)

    def _of_value(self, now: str, value: Any, content: Any, depth: int = _DEPTH) -> Iterator[str]:
        constant = repr(value) if value is None or isinstance(value, bool) else self._name(value)
        if isinstance(value, (*PLAIN, tuple, types.MethodType)) and not isinstance(value, (bool, type(None))):
            yield f"({now} is {constant} or same({now}, {constant}))"
        else:
            yield f"{now} is {constant}"
        if isinstance(value, types.MappingProxyType):
            value, content = behind_proxy(value), content_of(value)
        if isinstance(value, (set, np.ndarray, *BUFFERS)):
            yield f"same_content({constant}, {self._name(content)})"
        elif depth and (isinstance(value, tuple) or is_container(value)):
            yield from self._of_content(value, content, depth - 1)

    def _of_content(self, container: Any, content: Any, depth: int) -> Iterator[str]:
        """What a container holds, and what the containers in it hold."""
        if id(container) in self._contents:
            return
        self._contents.add(id(container))
        name, is_dict = self._name(container), isinstance(content, dict)
        values: tuple[Any, ...] = tuple(content.values()) if is_dict else tuple(content)
        if not isinstance(container, tuple):
            yield f"len({name}) == {len(values)}"
        has_inputs = any((id(container), key) in self._inputs for key in (content if is_dict else range(len(values))))
        if has_inputs or (is_dict and len(values) <= _MAX_NAMED):
            for key, value in cast("dict[Any, Any]", content).items() if is_dict else enumerate(values):
                yield from self._of_entry(cast("dict[Any, Any]", container), key, value, content_of(value), depth)
            return
        if is_dict:
            yield f"all(map(is_, {name}, {self._name(tuple(content))}))"
            yield f"all(map(same, {name}.values(), {self._name(values)}))"
        elif values and not isinstance(container, tuple):
            yield f"all(map(same, {name}, {self._name(values)}))"
        for value in values if depth else ():
            if (is_container(value) or isinstance(value, tuple)) and not isinstance(value, set):
                yield from self._of_content(value, content_of(value), depth - 1)

    def _of_modules(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        """Children, classes and hooks of every module."""
        modules = tuple(model.modules())
        hooks: list[tuple[str, Mapping[int, Any]]] = [("every module", each) for each in torch_internals.global_hooks()]
        for module in modules:
            path = self._paths[id(module)]
            children = torch_internals.children_of(module)
            if children:
                yield f"len({self._name(children)}) == {len(children)}", f"the children of {path}"
            for name, child in children.items():
                label = f"{path}.{name}".removeprefix("the model.")
                yield f"{self._name(children)}[{name!r}] is {self._name(child) if child is not None else None}", label
            hooks += [(path, each) for each in torch_internals.hooks_of(module)]
        empty = tuple(each for _, each in hooks if not each)
        yield f"not any({self._name(empty)})", "hooks"
        for path, each in hooks:
            if each:
                yield f"tuple({self._name(each)}.values()) == {self._name(tuple(each.values()))}", f"hooks of {path}"
        classes = self._name(tuple(map(type, modules)))
        yield f"all(map(is_, map(type, {self._name(modules)}), {classes}))", "the classes of modules"
        kinds = tuple(dict.fromkeys(map(type, modules)))
        calls = self._name(tuple(map(_call_of, kinds)))
        yield f"all(map(is_, map(call_of, {self._name(kinds)}), {calls}))", "__call__ of modules"

    def label(self, read: Read) -> str:
        """The name of a slot, as the user would write it."""
        owner, name = read.owner, str(read.name)
        if read.kind is Kind.GLOBAL:
            return f"{read.path}.{name} (global)"
        if read.kind is Kind.CELL:
            return f"{name} (of the closure of {read.path})"
        path = read.path or self._paths.get(id(owner)) or type(owner).__qualname__
        return f"{path}.{name}".removeprefix("the model.")


def _paths(model: nn.Module, reads: Iterable[Read]) -> dict[int, str]:
    """Names of modules, and of the objects that their attributes hold."""
    paths = {id(module): name or "the model" for name, module in reversed([*model.named_modules()])}
    for read in reads:
        if read.kind is Kind.ATTRIBUTE and not isinstance(read.value, (*PLAIN, Tensor)):
            owner = paths.get(id(read.owner), type(read.owner).__qualname__)
            paths.setdefault(id(read.value), f"{owner}.{read.name}".removeprefix("the model."))
    return paths


def _check_iterator(read: Read, label: str) -> None:
    is_of_library = type(read.owner).__module__.split(".")[0] in sys.stdlib_module_names
    if isinstance(read.value, Iterator) and not hasattr(read.value, "__dict__") and not is_of_library:
        raise CaptureError(
            f"The forward reads {label}, a {type(read.value).__qualname__}, whose next items a compiled step cannot "
            "take. Keep a list and an index, count with a number (self.calls += 1), or pass the item as an argument."
        )


def _holds_fake(value: Any, depth: int = 2) -> bool:
    if isinstance(value, Tensor):
        return torch_internals.is_fake(value)
    if depth == 0 or not (isinstance(value, tuple) or is_container(value)):
        return False
    return any(_holds_fake(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _text(value: Any) -> str:
    if value is ABSENT:
        return "is absent"
    if isinstance(value, Tensor):
        return f"is an input: {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if torch_internals.is_symbolic(value):
        return "is an input"
    text = repr(value) if isinstance(value, (*PLAIN, tuple)) else f"this {type(value).__qualname__}"
    return f"= {text[:80]}"
