"""The Python state that a plan was traced for: what it must be, what of it is an input, and what a step leaves behind.

state.holds()                           at each call: is it what the plan was traced for?
values = state.read()                   tensors and numbers of the state, inputs of the graph
state.replay(tensors, values)           after a forward that succeeded
"""

import collections
import contextlib
import functools
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor, nn

from fxzero.capture.guards import Guards, same
from fxzero.capture.hooks.observer import Observer
from fxzero.capture.numbers import Numbers, NumberSlot
from fxzero.capture.places import items_in
from fxzero.capture.slots import ABSENT, Read, content_of, is_container
from fxzero.capture.writes import Write, entry_of, put

_DEPTH = 8
"""Levels of containers in containers that are compared."""


class Values(NamedTuple):
    """Values of the Python state at one call."""

    inputs: list[Any]
    """Inputs of the graph, in the order of its STATE placeholders: tensors, then numbers."""
    left_behind: Sequence[Any]
    """Numbers that the step leaves behind."""
    numbers: list[Any]
    """What the slots of numbers held."""


_NOTHING = Values([], (), [])


@dataclass(frozen=True)
class PythonState:
    """The Python state of one plan."""

    guards: Guards
    numbers: Numbers
    tensors: tuple[tuple[dict[Any, Any], Any], ...]
    """The dict and the key of each tensor that is an input."""
    writes: tuple[Write, ...]
    observers: tuple[Observer, ...]
    """Hooks to call after each forward."""
    candidates: tuple[NumberSlot, ...]
    """Numbers that the forward read and that the graph has as constants."""
    read_late: tuple[tuple[str, dict[Any, Any], Any], ...] = ()
    """The label, dict and key of each slot that code in backward reads; a step has what it held in forward."""

    @functools.cached_property
    def has_inputs(self) -> bool:
        """True if the graph reads something of it at each call."""
        return bool(self.tensors or self.numbers.slots)

    @functools.cached_property
    def leaves_behind(self) -> bool:
        """True if there is something to do after each forward."""
        return bool(self.writes or self.observers)

    def holds(self) -> bool:
        """True if the plan fits the state now."""
        return self.guards.hold() and (not self.numbers.slots or self.numbers.hold())

    def changed(self) -> list[str]:
        """The names of slots that do not hold what the plan was traced for."""
        failed = self.guards.failed()
        return failed if failed or self.numbers.hold() else [each.label for each in self.numbers.slots]

    def read(self) -> Values:
        """The values of this call."""
        if not self.has_inputs:
            return _NOTHING
        numbers = self.numbers.read()
        lifted, left_behind = self.numbers.compute(*numbers)
        return Values([*(_without_history(owner[key]) for owner, key in self.tensors), *lifted], left_behind, numbers)

    def replay(self, tensors: Sequence[Any], values: Values) -> None:
        """Leave behind what the model's own forward would."""
        for write in self.writes:
            write.replay(tensors, values.left_behind)
        for observer in self.observers:
            observer.run(tensors)

    def late_values(self) -> list[Any]:
        """What the slots hold that code in backward reads, for `changed_since`."""
        return [_frozen(owner.get(key, ABSENT)) for _, owner, key in self.read_late]

    def changed_since(self, values: Sequence[Any]) -> str | None:
        """The label of a slot that code in backward reads, and that has changed since `late_values()`."""
        now = zip(self.read_late, self.late_values(), values, strict=True)
        return next((label for (label, *_), value, then in now if not same(value, then)), None)

    @contextlib.contextmanager
    def as_before(self, values: Values) -> Generator[None]:
        """Let slots that the step wrote hold what they held before it, for a trace that comes later."""
        entries = [(each.owner, each.key, each.before) for each in self.writes if each.sets_entry]
        entries += [(s.owner, s.key, number) for s, number in zip(self.numbers.slots, values.numbers, strict=True)]
        entries += [(*slot, tensor) for slot, tensor in zip(self.tensors, values.inputs, strict=False)]
        now = [(owner, key, entry_of(owner, key)) for owner, key, _ in entries]
        put(entries)
        try:
            yield
        finally:
            put(now)


def _frozen(value: Any, depth: int = _DEPTH) -> Any:
    """What `same` tells apart from a changed value: of a container what it holds, of a tensor which one it is."""
    if isinstance(value, Tensor):
        return weakref.ref(value)
    if depth and (isinstance(value, tuple) or is_container(value)):
        content = content_of(value)
        if isinstance(content, frozenset):
            return id(value), content
        items = [*content.keys(), *content.values()] if isinstance(content, dict) else [*content]
        return id(value), [_frozen(each, depth - 1) for each in items]
    return content_of(value).tobytes() if isinstance(value, np.ndarray) else value


def _without_history(tensor: Tensor) -> Tensor:
    """The tensor, but no calls before that computed it, each of which would hold the one before."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def state_of(
    model: nn.Module,
    reads: Sequence[Read],
    late: Sequence[Read],
    tensors: Sequence[tuple[dict[Any, Any], Any]],
    numbers: Numbers,
    writes: tuple[Write, ...],
    observers: tuple[Observer, ...],
) -> PythonState:
    """The state of a trace that is over.

    Args:
        late: what code in backward reads.
        tensors: the dict and the key of each tensor that is an input.
    """
    inputs = {(id(owner), key): owner[key] for owner, key in tensors}
    inputs |= {each.slot: each.value for each in numbers.slots}
    # A tensor that is set anew, and that the graph does not read, may be any other: its geometry alone is guarded.
    known = {id(read.place) for read in reads} | {id(read.value) for read in reads}
    used = set(map(id, inputs.values()))  # it may lie in several places, of which the graph reads one
    replaced = [each for each in writes if each.sets_entry and id(each.owner) in known and id(each.before) not in used]
    inputs |= {(id(each.owner), each.key): each.before for each in replaced if isinstance(each.before, Tensor)}
    guards = Guards(model, reads, inputs)
    candidates = {each.slot: each for each in _number_slots(reads, guards) if each.slot not in inputs}
    read_late = tuple((guards.label(each), place, each.name) for each in late if (place := each.place) is not None)
    return PythonState(guards, numbers, tuple(tensors), writes, observers, tuple(candidates.values()), read_late)


def tensors_read(
    reads: Sequence[Read], constants: Mapping[str, Tensor], writes: Sequence[Write]
) -> dict[str, tuple[dict[Any, Any], Any]]:
    """The dict and the key that hold each tensor which a traced graph reads, by the target of its get_attr.

    Of a tuple, list or dict these are its items, if forward makes it anew (`self.state =
    h, c`) or sets them.

    Args:
        constants: the real tensors that the traced graph reads, by target.
        writes: what forward leaves behind.
    """
    targets = {id(constant): target for target, constant in constants.items()}
    written = {(id(each.owner), each.key) for each in writes}
    slots: dict[str, tuple[dict[Any, Any], Any]] = {}
    for read in reads:
        owner = read.place
        if owner is None:
            continue
        held = [(owner, read.name, read.value), *_items_written(owner, read, written)]
        for place, key, value in held:
            if isinstance(value, Tensor) and id(value) in targets:
                slots.setdefault(targets[id(value)], (place, key))
    return slots


def _items_written(owner: dict[Any, Any], read: Read, written: AbstractSet[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """The place, key and value of each item of a container that forward makes anew, or whose item it sets."""
    if not isinstance(read.value, (tuple, list, dict, collections.deque)):
        return
    is_dict = isinstance(read.content, dict)
    entries = cast("Mapping[Any, Any]", read.content).items() if is_dict else enumerate(read.content)
    if (id(owner), read.name) in written:
        yield from ((items_in(owner, read.name), key, value) for key, value in entries)
    elif not isinstance(read.value, tuple):
        yield from ((read.value, key, value) for key, value in entries if (id(read.value), key) in written)


def _number_slots(reads: Sequence[Read], guards: Guards) -> Generator[NumberSlot]:
    for read in reads:
        owner = read.place
        if owner is not None and type(read.value) in (int, float):
            yield NumberSlot(owner, read.name, guards.label(read), read.value)
        elif isinstance(read.value, (dict, list, collections.deque)):
            for key, value in read.content.items() if isinstance(read.value, dict) else enumerate(read.content):
                if type(value) in (int, float):
                    yield NumberSlot(cast("Any", read.value), key, f"{guards.label(read)}[{key!r}]", value)
