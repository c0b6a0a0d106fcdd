"""State that a forward leaves behind, seen by comparing before and after a trace, and left behind again by each step.

left behind                                        each step that succeeds
a plain value (a counter, a flag)                  sets it: what it came from is guarded, or it is a number of the graph
a tensor, or a list, tuple or dict of tensors      sets it to tensors that are outputs of the graph
items added to a list, entries set in it or a dict adds or sets them
a hook, a submodule, a function or a class         nothing: it stays from the first trace, and the model is traced again
any other object that holds a tensor               refused
"""

import collections
import contextlib
import gc
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.code.users_code import is_users_class
from fxzero.capture.guards import same
from fxzero.capture.places import ClassAttributes, attributes_of, names_of_slots, slots_of
from fxzero.capture.slots import ABSENT, PLAIN, Slot, content_of, is_container
from fxzero.errors import CaptureError
from fxzero.torch_internals import TreeSpec, tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Output:
    """Stands for a tensor or a number that a step computes, in a value that it leaves behind."""

    index: int
    """Index into the flat outputs of the graph; of a number, into those of the plan's numbers."""
    is_number: bool = False


def output_in(kept: list[Any], value: Any, *, is_number: bool = False) -> Output:
    """The output that stands for a value: its place among those that are kept already, or a new one behind them."""
    index = next((index for index, each in enumerate(kept) if each is value), len(kept))
    if index == len(kept):
        kept.append(value)
    return Output(index, is_number)


@dataclass(frozen=True)
class Template:
    """A value with an Output in the place of each tensor and number that a step computes."""

    leaves: tuple[Any, ...]
    treespec: TreeSpec

    def filled(self, tensors: Sequence[Any], numbers: Sequence[Any] = ()) -> Any:
        """The value of a step."""
        leaves = [
            (numbers if leaf.is_number else tensors)[leaf.index] if isinstance(leaf, Output) else leaf
            for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.treespec)


@dataclass(frozen=True)
class Write:
    """What each step does with one slot."""

    owner: Any
    """A dict (`vars` of an object, or one that the user made), a list, a deque or a set."""
    key: Any
    """The key of a dict, the index of an item of a list; None for items that are added."""
    template: Template
    before: Any
    """What the slot held before the trace; for items that are added, how many there were."""
    name: str

    @property
    def sets_entry(self) -> bool:
        """True for an entry that is set, False for items that are added."""
        return isinstance(self.owner, dict) or self.key is not None

    def replay(self, tensors: Sequence[Any], numbers: Sequence[Any]) -> None:
        """Leave behind what eager would."""
        value = self.template.filled(tensors, numbers)
        if self.sets_entry:
            self.owner[self.key] = value
        elif isinstance(self.owner, set):
            self.owner.update(value)
        else:
            self.owner.extend(value)


@dataclass(frozen=True)
class Moment:
    """What the known state held at some time; what is known only later held then what it held before."""

    attributes: Mapping[int, dict[str, Any]]
    containers: Mapping[int, Any]
    places: Mapping[Slot, Any]


class Before:
    """The state of a model's modules, and of objects met on the way, before a forward."""

    def __init__(self, model: nn.Module) -> None:
        self._names: dict[int, str] = {}
        self._objects: dict[int, tuple[int, dict[str, Any], dict[str, Any]]] = {}
        """Maps the id of a `__dict__` to the id of its object, to it, and to a copy."""
        self._containers: dict[int, tuple[Any, Any]] = {}
        """Maps the id of a container to it and to what it held."""
        self.alive: list[Any] = []
        """Objects whose ids are in use."""
        self.met: list[Any] = []
        """Values that were followed, among them some that forward made."""
        self._entries: list[tuple[dict[Any, Any], Any, Any]] = []
        """Entries that symbolic numbers take the place of, with their numbers."""
        self._places: dict[Slot, tuple[dict[Any, Any], str, Any, str]] = {}
        """Globals, variables of closures and attributes of classes: dict or place, key, what it held, and name."""
        self._classes: set[type] = set()
        self._buffer_tables: set[int] = set()
        """Ids of tables of buffers, whose entries others swap."""
        self._structure: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        """Tables of hooks and submodules, and what they held."""
        for name, module in model.named_modules():
            self._add_attributes(module, name or "the model")
            tables = (torch_internals.children_of(module), *torch_internals.hooks_of(module))
            self._structure += [(table, dict(table)) for table in tables]

    def add(self, value: Any) -> None:
        """Remember what a plain object or a container holds now."""
        if is_container(value):
            self._containers.setdefault(id(value), (value, content_of(value)))
        elif hasattr(value, "__dict__"):
            self._add_attributes(value, getattr(value, "__qualname__", type(value).__qualname__))
        for name in names_of_slots(type(value)) if is_users_class(type(value)) else ():
            self.add_place(slots_of(value), name, f"{type(value).__qualname__}.{name}")

    def add_entry(self, owner: dict[Any, Any], key: Any) -> None:
        """Remember what an entry holds that is about to hold a symbolic number."""
        self._entries.append((owner, key, owner[key]))

    def add_place(self, owner: dict[Any, Any], key: str, name: str) -> None:
        """Remember what a global, a variable of a closure or an attribute of a class holds now."""
        self._places.setdefault((id(owner), key), (owner, key, owner.get(key, ABSENT), name))

    def _add_class(self, kind: type) -> None:
        self._classes.add(kind)
        if is_users_class(kind):
            for key, value in vars(kind).items():
                if not key.startswith("__") and not _stays(value):
                    self.add_place(attributes_of(kind), key, f"{kind.__qualname__}.{key}")

    def _add_attributes(self, owner: Any, name: str) -> None:
        attributes = vars(owner)
        if id(attributes) in self._objects:
            return
        for kind in type(owner).__mro__:
            if kind not in self._classes:
                self._add_class(kind)
        self._objects[id(attributes)] = id(owner), attributes, dict(attributes)
        self._names[id(attributes)] = name
        for key, value in attributes.items():
            if is_container(value) and key not in torch_internals.MODULE_ATTRIBUTES:
                self._containers.setdefault(id(value), (value, content_of(value)))
                self._names.setdefault(id(value), f"{name}.{key}".removeprefix("the model."))
        for table in torch_internals.buffer_tables(owner) if isinstance(owner, nn.Module) else ():
            if not is_container(table):  # of a scripted module
                continue
            self._containers[id(table)] = table, content_of(table)
            self._names[id(table)] = name
            self._buffer_tables.add(id(table))

    # -- after the forward ---------------------------------------------------------------------------------------

    def writes(
        self, set_slots: AbstractSet[Slot], given: Mapping[Slot, Any], index_of: Callable[[Any], Output | None]
    ) -> Iterator[Write]:
        """What each step must leave behind.

        Args:
            set_slots: attributes that were set, if only to what they held before.
            given: the symbolic numbers that slots held.
            index_of: gives the output that stands for a tensor or number that the step computes; None for other values.

        Raises:
            CaptureError: the forward removed something, or left something that no step can compute.
        """
        for owner, key, now, before in self._changes(set_slots, given):
            if not _stays(now):
                name = self._name_of(owner, key)
                yield Write(owner, key, _template(now, name, index_of), before, name)

    def _changes(self, set_slots: AbstractSet[Slot], given: Mapping[Slot, Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Owner, key, value now and value before of each changed slot; the key of items that were added is None."""
        for object_id, attributes, before in list(self._objects.values()):
            if removed := [key for key in before if key not in attributes and not _is_cache(key)]:
                raise CaptureError(_deletes(self._name_of(attributes, removed[0])))
            for key, now in attributes.items():
                held = before.get(key, ABSENT)
                is_same = now is given.get((id(attributes), key), held) and (object_id, key) not in set_slots
                if not is_same and not _is_cache(key) and key not in torch_internals.MODULE_ATTRIBUTES:
                    yield attributes, key, now, held
        for owner, key, before, name in self._places.values():
            now = owner.get(key, ABSENT)
            if now is ABSENT and before is not ABSENT:
                raise CaptureError(_deletes(name))
            if now is not given.get((id(owner), key), before):
                yield owner, key, now, before
        for container, before in list(self._containers.values()):
            if _differs(container, before) and (id(container) in self._names or not self._is_forgotten(container)):
                yield from self._changes_of(container, before, given)

    def _is_forgotten(self, container: Any) -> bool:
        """True for a container that only this object holds any more: the forward made it, and it is over."""
        known = {id(self.alive), id(self.met), id(self._containers.get(id(container)))}
        for each in gc.get_referrers(container):
            is_running = isinstance(each, types.FrameType) or getattr(each, "gi_code", None) is _CHANGES
            if not (is_running or id(each) in known):
                return False
        return True

    def _changes_of(
        self, container: Any, before: Any, given: Mapping[Slot, Any]
    ) -> Iterator[tuple[Any, Any, Any, Any]]:
        if isinstance(container, dict) and before.keys() <= container.keys():
            for key, now in cast("dict[Any, Any]", container).items():
                held = before.get(key, ABSENT)
                is_buffer = id(container) in self._buffer_tables and key in before
                if now is not given.get((id(container), key), held) and not is_buffer:
                    yield container, key, now, held
        elif isinstance(container, set) and before <= container:
            if now := container - before:
                yield container, None, sorted(now, key=str), len(before)
        elif isinstance(container, (list, collections.deque)) and len(container) >= len(before):
            for index, (now, held) in enumerate(zip(container, before, strict=False)):
                if now is not given.get((id(container), index), held):
                    yield container, index, now, held
            if now := list(container)[len(before) :]:
                yield container, None, now, len(before)
        else:
            raise CaptureError(
                f"The forward removes items of {self._name_of(container, None)}, which a compiled step "
                "cannot do again. Let forward make a new list, or return the items."
            )

    def class_writes(self) -> dict[Slot, tuple[ClassAttributes, Any]]:
        """The class of each attribute of a class that holds another plain value now, and what it held before."""
        return {
            slot: (owner, before)
            for slot, (owner, key, before, _) in self._places.items()
            if isinstance(owner, ClassAttributes) and before is not owner.get(key) and isinstance(before, PLAIN)
        }

    def now(self) -> Moment:
        """What everything holds now."""
        return Moment(
            {key: dict(attributes) for key, (_, attributes, _) in self._objects.items()},
            {key: content_of(container) for key, (container, _) in self._containers.items()},
            {slot: owner.get(key, ABSENT) for slot, (owner, key, *_) in self._places.items()},
        )

    def changes_since(self, then: Moment) -> dict[Any, Any]:
        """Maps slots, and ids of containers, that hold something else than at some time in the forward to what it is.

        Of a container it is a list of what is new in it.
        """
        changes: dict[Any, Any] = {}
        for key, (object_id, attributes, before) in self._objects.items():
            known = then.attributes.get(key, before)
            for name in known.keys() | attributes.keys():
                now = attributes.get(name, ABSENT)
                is_own = _is_cache(name) or name in torch_internals.MODULE_ATTRIBUTES
                if now is not known.get(name, ABSENT) and not is_own:
                    changes[object_id, name] = now
        for key, (container, before) in self._containers.items():
            content = then.containers.get(key, before)
            if _differs(container, content):
                held = set(map(id, _items(content)))
                changes[key] = [each for each in _items(container) if id(each) not in held]
        for slot, (owner, key, before, _) in self._places.items():
            if (now := owner.get(key, ABSENT)) is not then.places.get(slot, before):
                changes[slot] = now
        return changes

    @property
    def num_parts(self) -> int:
        """Hooks and submodules that there are now."""
        return sum(len(table) for table, _ in self._structure)

    def changed_since(self, then: Moment) -> str | None:
        """The name of something that holds another value than at some time in the forward; None if there is nothing.

        A traced tensor in the place of another is no change: a checkpoint computes what it was once more.
        """
        for key, (_, attributes, before) in self._objects.items():
            known = then.attributes.get(key, before)
            for name in known.keys() | attributes.keys():
                values = attributes.get(name, ABSENT), known.get(name, ABSENT)
                if not (_is_equal(*values) or _is_cache(name) or name in torch_internals.MODULE_ATTRIBUTES):
                    return self._name_of(attributes, name)
        for key, (container, before) in self._containers.items():
            content = then.containers.get(key, before)
            is_equal = len(container) == len(content) and all(map(_is_equal, _items(container), _items(content)))
            if not (container == content if isinstance(container, set) else is_equal):
                return self._name_of(container, None)
        for slot, (owner, key, before, name) in self._places.items():
            if not _is_equal(owner.get(key, ABSENT), then.places.get(slot, before)):
                return name
        return None

    def go_back_to(self, then: Moment) -> None:
        """Let everything hold again what it held at some time."""
        for key, (_, attributes, before) in self._objects.items():
            _fill(attributes, then.attributes.get(key, before))
        for key, (container, before) in self._containers.items():
            _fill(container, then.containers.get(key, before))
        put((owner, key, then.places.get(slot, before)) for slot, (owner, key, before, _) in self._places.items())

    def changed_now(self) -> frozenset[Any]:
        """What holds something else than before: slots, and the ids of containers."""
        slots = {
            (object_id, key)
            for object_id, attributes, before in self._objects.values()
            for key in attributes.keys() | before.keys()
            if attributes.get(key, ABSENT) is not before.get(key, ABSENT) and not _is_cache(key)
        }
        slots |= {
            slot for slot, (owner, key, before, _) in self._places.items() if owner.get(key, ABSENT) is not before
        }
        return frozenset(slots | {id(each) for each, before in self._containers.values() if _differs(each, before)})

    def undo_structure(self) -> None:
        """Take back hooks, submodules, functions and classes that were set, of a trace that failed."""
        for table, before in self._structure:
            if is_container(table) and table != before:  # a scripted module's table is none
                table.clear()
                table.update(before)
        for _, attributes, before in self._objects.values():
            _fill(attributes, before)
        put((owner, key, before) for owner, key, before, _ in self._places.values())

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Let everything hold again what it held, at the end of the block.

        Hooks, submodules, functions and classes that were set stay: a second trace finds them. So do flags that were
        set with them, which say that they are there.
        """
        try:
            yield
        finally:
            is_new = any(now != before for now, before in self._structure)
            for _, attributes, before in self._objects.values():
                changed = {key: now for key, now in attributes.items() if now is not before.get(key)}
                stay = {key: now for key, now in changed.items() if _stays(now) or (is_new and now is True)}
                _fill(attributes, before | stay)
            for container, before in self._containers.values():
                _fill(container, before)
            put((o, key, before) for o, key, before, _ in self._places.values() if not _stays(o.get(key, ABSENT)))
            for owner, key, value in self._entries:  # an object that was met late held a symbolic number then
                owner[key] = value

    @property
    def has_new_structure(self) -> bool:
        """True if hooks, submodules, functions or classes stay that were not there before."""
        attributes = [(now, before) for _, now, before in self._objects.values()]
        places = [(owner.get(key, ABSENT), before) for owner, key, before, _ in self._places.values()]
        return (
            any(now != before for now, before in self._structure)
            or any(v is not before.get(key) and _stays(v) for now, before in attributes for key, v in now.items())
            or any(now is not before and _stays(now) for now, before in places)
        )

    def _name_of(self, owner: Any, key: Any) -> str:
        """The name of a slot, as the user would write it."""
        if (id(owner), key) in self._places:
            return self._places[id(owner), key][-1]
        name = self._names.get(id(owner), "a container that a closure or a global holds")
        if key is None:
            return name
        is_attribute = id(owner) in self._objects or id(owner) in self._buffer_tables
        return f"{name}.{key}".removeprefix("the model.") if is_attribute else f"{name}[{key!r}]"


_CHANGES = Before._changes.__code__  # pyright: ignore[reportPrivateUsage]
"""Of the generator that looks at containers, and holds each while it does."""


def _deletes(name: str) -> str:
    return f"The forward deletes {name}, which a compiled step cannot do again. Set it to None."


def put(entries: Iterable[tuple[dict[Any, Any], Any, Any]]) -> None:
    """Let entries of dicts and lists hold values; none where the value is ABSENT."""
    for owner, key, value in entries:
        if value is ABSENT:
            owner.pop(key, None)
        elif entry_of(owner, key) is not value:
            owner[key] = value


def entry_of(owner: Any, key: Any) -> Any:
    """What an entry of a dict or an item of a list holds; ABSENT if there is none."""
    if isinstance(owner, dict):
        return cast("dict[Any, Any]", owner).get(key, ABSENT)
    return owner[key] if key < len(owner) else ABSENT


def _differs(container: Any, content: Any) -> bool:
    if isinstance(container, set):  # a copy may have another order
        return container != content
    if isinstance(container, dict) and container.keys() != content.keys():
        return True
    return len(container) != len(content) or not all(map(_is, _items(container), _items(content)))


def _is_equal(now: Any, then: Any) -> bool:
    """True for values that are the same to every computation, and for two traced tensors of one geometry."""
    if torch_internals.is_fake(now) and isinstance(then, Tensor):
        return torch_internals.is_fake(then) and (now.shape, now.dtype) == (then.shape, then.dtype)
    return same(now, then)


def _fill(container: Any, content: Any) -> None:
    if not _differs(container, content):
        return
    container.clear()
    if isinstance(container, dict):
        for key, value in content.items():  # one that has no `update` of its own, as transformers' outputs
            container[key] = value
    else:
        (container.update if isinstance(container, set) else container.extend)(content)


def _template(value: Any, name: str, index_of: Callable[[Any], Output | None]) -> Template:
    """The template of a value that is left behind."""
    flat, treespec = tree_flatten(value, is_leaf=lambda each: not isinstance(each, (list, tuple, dict)))
    leaves: list[Any] = []
    for leaf in flat:
        output = index_of(leaf)
        if output is None and not isinstance(leaf, PLAIN) and _holds_traced(leaf):
            raise CaptureError(
                f"The forward leaves a {type(leaf).__qualname__} with tensors in {name}. A compiled step can leave "
                "behind tensors, plain values, and lists, tuples and dicts of them. Return it from forward instead."
            )
        leaves.append(leaf if output is None else output)
    return Template(tuple(leaves), treespec)


def _is(a: Any, b: Any) -> bool:
    return a is b


def _items(container: Any) -> Iterable[Any]:
    return dict.values(cast("dict[Any, Any]", container)) if isinstance(container, dict) else container


def _is_cache(key: str) -> bool:
    return key in torch_internals.RNN_CACHES


def _stays(value: Any) -> bool:
    return isinstance(value, nn.Module) or callable(value)


def _holds_traced(value: Any) -> bool:
    """True for an object that holds a traced tensor, directly or in one of its containers."""
    flat = tree_flatten(list(vars(value).values()) if hasattr(value, "__dict__") else value)[0]
    return any(map(torch_internals.is_fake, flat))
