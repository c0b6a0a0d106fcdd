"""Which numbers of the Python state, and of the arguments, change from call to call, and so are inputs of the graph.

A number that a forward sets itself (a counter) is tried as an input at the second trace, any other at its third value.
A number that the trace needs itself (the p of a dropout) stays a constant: each of its values is traced, and one
warning names it.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fxzero.capture import Captured
from fxzero.capture.call import ANY_NUMBER, CallSpec, PlainLeaf
from fxzero.capture.numbers import NumberSlot, PinnedNumberError
from fxzero.capture.state import PythonState
from fxzero.graph.nodes import Role, info, role

logger = logging.getLogger(__name__)

TIMES = 2
"""Changes of a number after which it is tried as an input."""
MAX_TRIES = 2
"""Traces with a number as an input that may fail."""


@dataclass
class ChangingArguments:
    """The plain numbers among the arguments that have taken several values."""

    values: dict[Any, int | float] = field(default_factory=dict[Any, Any])
    """What those that are inputs hold in the present call, by structure of the call and index of the leaf."""
    _seen: dict[Any, set[Any]] = field(default_factory=dict[Any, "set[Any]"])
    _pinned: set[Any] = field(default_factory=set[Any])

    def generalized(self, call: CallSpec) -> CallSpec:
        """The spec of a call without the values of numbers that are inputs."""
        if not any(leaf[0] is float or leaf[0] is int for leaf in call.leaves):
            return call
        leaves = [self._leaf(call, index, leaf) for index, leaf in enumerate(call.leaves)]
        return CallSpec(call.structure, tuple(leaves))

    def _leaf(self, call: CallSpec, index: int, leaf: Any) -> Any:
        key = (call.structure, index)
        if leaf[0] not in (int, float) or key in self._pinned:
            return leaf
        seen = self._seen.setdefault(key, set())
        if len(seen) <= TIMES:
            seen.add(leaf)
        if len(seen) <= TIMES:
            return leaf
        self.values[key] = leaf.number
        return PlainLeaf(leaf.type, ANY_NUMBER)

    def slots(self, call: CallSpec) -> list[NumberSlot]:
        """The numbers of a generalized call that are inputs."""
        keys = [(index, (call.structure, index)) for index, leaf in enumerate(call.leaves) if _is_input(leaf)]
        return [NumberSlot(self.values, key, call.paths[index], self.values[key], index) for index, key in keys]

    def pin(self, call: CallSpec) -> None:
        """Let the numbers of a call be constants from now on."""
        for index, leaf in enumerate(call.leaves):
            if _is_input(leaf):
                self._pinned.add((call.structure, index))
                warn_of(call.paths[index])


@dataclass
class ChangingNumbers:
    """The numbers of one model that have changed."""

    arguments: ChangingArguments = field(default_factory=ChangingArguments)
    _changes: dict[tuple[int, Any], int] = field(default_factory=dict[Any, int])
    _slots: dict[tuple[int, Any], NumberSlot] = field(default_factory=dict[Any, NumberSlot])
    _failed: dict[tuple[int, Any], int] = field(default_factory=dict[Any, int])

    def note(self, state: PythonState) -> None:
        """Note which numbers differ from those that a plan was traced for."""
        written = {(id(write.owner), write.key) for write in state.writes}
        for each in state.candidates:
            if each.value != each.traced or type(each.value) is not type(each.traced):
                self._slots[each.slot] = each
                self._changes[each.slot] = self._changes.get(each.slot, 0) + (TIMES if each.slot in written else 1)

    def captured(self, trace: Callable[..., Captured], call: CallSpec) -> Captured:
        """A traced step that has the numbers as inputs that can be.

        Raises:
            PinnedNumberError: a number among the arguments cannot be an input; from now on it is none.
        """
        arguments = self.arguments.slots(call)
        if not arguments:
            return self._captured(trace)
        plain = self._captured(trace)
        with contextlib.suppress(PinnedNumberError):
            found = trace(numbers=[*arguments, *plain.state.numbers.slots])
            if is_same_step(found, plain):
                return found
        self.arguments.pin(call)
        raise PinnedNumberError(f"{arguments[0].label} must be a constant")

    def _captured(self, trace: Callable[..., Captured]) -> Captured:
        wanted = [self._slots[slot] for slot, times in self._changes.items() if times >= TIMES and self._may_try(slot)]
        wanted = [each for each in wanted if type(each.value) in (int, float)]
        if not wanted:
            return trace()
        plain = trace()
        for numbers in (wanted, *([each] for each in wanted if len(wanted) > 1)):
            try:
                found = trace(numbers=numbers)
            except PinnedNumberError as error:
                logger.debug("%s cannot be inputs: %s", [each.label for each in numbers], error)
                found = None
            if found is not None and is_same_step(found, plain):
                return found
            if len(numbers) == 1:
                self._note_failure(numbers[0])
        return plain

    def _may_try(self, slot: tuple[int, Any]) -> bool:
        return self._failed.get(slot, 0) < MAX_TRIES

    def _note_failure(self, each: NumberSlot) -> None:
        self._failed[each.slot] = self._failed.get(each.slot, 0) + 1
        if not self._may_try(each.slot):  # it is tried no more, so this comes once
            warn_of(each.label)


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, PlainLeaf) and leaf.is_input


def warn_of(label: str) -> None:
    """Warn that each value of a number is traced for itself."""
    warnings.warn(
        f"{label} changes from call to call, and forward uses it where it must be a constant of the compiled step: "
        "each new value is traced and planned anew, which takes as long as the first call. Let it take few values, or "
        "make it a tensor (a buffer, an argument) and compute with that.",
        stacklevel=2,
    )


def is_same_step(found: Captured, plain: Captured) -> bool:
    """True if a step with numbers as inputs computes, for their present values, what the step with constants does."""
    return found.state.numbers.hold() and _operators(found) == _operators(plain)


def _operators(captured: Captured) -> list[str]:
    """The operators of a step and their arguments, with numbers of the state in the place of the inputs for them."""
    given = dict(zip(captured.step.nodes(Role.STATE), captured.state.read().inputs, strict=True))
    names: dict[fx.Node, Any] = {}
    lines: list[str] = []
    for node in captured.step.graph.nodes:
        value = given.get(node)
        if node.op == "call_function":
            names[node] = f"%{len(lines)}"
            lines.append(repr((str(node.target), map_arg((node.args, node.kwargs), names.__getitem__))))
        else:
            names[node] = value if isinstance(value, (int, float)) else f"{role(node).value} {info(node).fqn}"
    return lines
