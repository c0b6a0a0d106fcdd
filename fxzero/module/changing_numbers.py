"""Which numbers of the Python state change from call to call, and are therefore inputs of the graph.

A number that a forward sets itself (a counter) is tried as an input at the second trace, any other at its third value.
A number that the trace needs itself (the p of a dropout) stays a constant: each of its values is traced, and one
warning names it.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fxzero.capture import Captured
from fxzero.capture.numbers import NumberSlot, PinnedNumberError
from fxzero.capture.state import PythonState

logger = logging.getLogger(__name__)

TIMES = 2
"""Changes of a number after which it is tried as an input."""
MAX_TRIES = 2
"""Traces with a number as an input that may fail."""


@dataclass
class ChangingNumbers:
    """The numbers of one model that have changed."""

    _changes: dict[tuple[int, Any], int] = field(default_factory=dict[Any, int])
    _slots: dict[tuple[int, Any], NumberSlot] = field(default_factory=dict[Any, NumberSlot])
    _failed: dict[tuple[int, Any], int] = field(default_factory=dict[Any, int])
    _warned: set[tuple[int, Any]] = field(default_factory=set[Any])

    def note(self, state: PythonState) -> None:
        """Note which numbers differ from those that a plan was traced for."""
        written = {(id(write.owner), write.key) for write in state.writes}
        for each in state.candidates:
            if each.value != each.traced or type(each.value) is not type(each.traced):
                self._slots[each.slot] = each
                self._changes[each.slot] = self._changes.get(each.slot, 0) + (TIMES if each.slot in written else 1)

    def captured(self, trace: Callable[..., Captured]) -> Captured:
        """A traced step that has the numbers as inputs that can be."""
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
            if found is not None and operators_of(found) == operators_of(plain):
                return found
            if len(numbers) == 1:
                self._note_failure(numbers[0])
        return plain

    def _may_try(self, slot: tuple[int, Any]) -> bool:
        return self._failed.get(slot, 0) < MAX_TRIES

    def _note_failure(self, each: NumberSlot) -> None:
        self._failed[each.slot] = self._failed.get(each.slot, 0) + 1
        if not self._may_try(each.slot) and each.slot not in self._warned:
            self._warned.add(each.slot)
            warnings.warn(
                f"{each.label} changes from call to call, and forward uses it where it must be a constant of the "
                "compiled step: each new value is traced and planned anew, which takes as long as the first call. Let "
                "it take few values, or make it a tensor (a buffer) and compute with that.",
                stacklevel=2,
            )


def operators_of(captured: Captured) -> list[str]:
    """The operators of a step, in order."""
    return [str(node.target) for node in captured.step.graph.nodes if node.op == "call_function"]
