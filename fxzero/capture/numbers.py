"""Numbers of the Python state as inputs of a graph, so that a number that changes each step is not traced for ever.

A trace runs with a symbolic number in the slot. Arithmetic on it becomes nodes of the graph, which are then taken out
into a function of their own that runs on the host at each call, with Python's own rounding:

    graph of the trace:   mul = s * 0.9 | add = mul + 1 | x = aten.mul(h, add)        forward sets the slot to mul
    numbers:              def numbers(s): return (s * 0.9 + 1,), (s * 0.9,)           lifted, left behind
    graph of the step:    x = aten.mul(h, number_0)

What the trace decided by a comparison (`if s > 3`) is a condition, tested at each call. A number that the trace needs
itself (a shape, an argument that is a float in the operator's schema) makes the trace fail: its slot is pinned.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from fxzero import torch_internals
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, add_placeholder

Number: TypeAlias = "int | float"
Condition: TypeAlias = "Callable[[Sequence[Number]], bool]"

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "Equality": operator.eq,
    "Unequality": operator.ne,
    "StrictGreaterThan": operator.gt,
    "GreaterThan": operator.ge,
    "StrictLessThan": operator.lt,
    "LessThan": operator.le,
}
"""Comparisons, by the names of sympy's classes."""
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "Max": max,
    "Min": min,
}
"""Operations on integers, by the names of sympy's and torch's classes."""


class PinnedNumberError(Exception):
    """A trace needs the value of a number itself."""


@dataclass(frozen=True)
class NumberSlot:
    """A place in the Python state that holds an int or a float."""

    owner: dict[Any, Any]
    key: Any
    label: str
    traced: Any
    """What it held when it was read."""
    argument: int | None = None
    """The index of its leaf, if it is an argument of the call."""

    @property
    def slot(self) -> tuple[int, Any]:
        return id(self.owner), self.key

    @property
    def value(self) -> Any:
        try:
            return self.owner[self.key]
        except (KeyError, IndexError, AttributeError, ValueError):  # it is there no more
            return None


@dataclass(frozen=True)
class Numbers:
    """What a step computes on the host from the numbers in slots."""

    slots: tuple[NumberSlot, ...]
    compute: Callable[..., tuple[tuple[Number, ...], tuple[Number, ...]]]
    """Called with the numbers: those that the graph reads, and those that the step leaves behind."""
    conditions: tuple[Condition, ...]
    """What the trace decided; each is called with the numbers."""
    reads_slots: bool = True
    """True if the graph reads numbers of slots as they are, and the step leaves none behind."""

    def is_like(self, other: "Numbers") -> bool:
        """True if the graph reads what lies in the same slots, as it lies there."""
        same = [each.slot for each in self.slots] == [each.slot for each in other.slots]
        return same and self.reads_slots and other.reads_slots

    def under(self, conditions: Sequence[Condition]) -> "Numbers":
        """The same, where more was decided."""
        return replace(self, conditions=(*self.conditions, *conditions))

    def read(self) -> list[Any]:
        """What the slots hold now."""
        return [each.owner[each.key] for each in self.slots]

    def hold(self) -> bool:
        """True if the numbers lead to the same graph."""
        numbers = self.read()
        return all(condition(numbers) for condition in self.conditions)


NO_NUMBERS = Numbers((), lambda: ((), ()), ())


class StandIns:
    """Symbolic numbers that stand in slots during one trace."""

    def __init__(self, slots: Sequence[NumberSlot]) -> None:
        self.slots = tuple(slots)
        self.environment, self.fake_mode = torch_internals.symbolic_fake_mode()
        self.numbers = [
            torch_internals.symbolic_number(self.environment, each.value, f"number_{index}")
            for index, each in enumerate(slots)
        ]
        self._index = {torch_internals.symbol_of(number): index for index, number in enumerate(self.numbers)}

    def conditions(self) -> tuple[Condition, ...]:
        """What the trace decided.

        Raises:
            PinnedNumberError: it decided more than a comparison that can be tested exactly.
        """
        if any(symbol in self.environment.replacements for symbol in self._index):
            raise PinnedNumberError("the trace needs a number itself")
        return tuple(self._condition(guard.expr) for guard in self.environment.guards)

    def _condition(self, expression: Any) -> Condition:
        compare = _COMPARISONS.get(type(expression).__name__)
        if compare is None:
            raise PinnedNumberError(f"the trace depends on {expression}")
        left, right = (self._value(side) for side in expression.args)
        is_bare = all(side.is_Symbol or side.is_number for side in expression.args)
        if not is_bare and any(isinstance(self.numbers[i], torch.SymFloat) for i in self._indices(expression)):
            raise PinnedNumberError(f"{expression} rounds otherwise than the model does")
        return lambda numbers: compare(left(numbers), right(numbers))

    def _indices(self, expression: Any) -> list[int]:
        return [self._index[symbol] for symbol in expression.free_symbols if symbol in self._index]

    def _value(self, expression: Any) -> Callable[[Sequence[Number]], Number]:
        """A function of the numbers, exact for integers."""
        if expression in self._index:
            index = self._index[expression]
            return lambda numbers: numbers[index]
        if expression.is_Integer or expression.is_Float:
            constant = int(expression) if expression.is_Integer else float(expression)
            return lambda numbers: constant
        name = type(expression).__name__
        if name not in _OPERATIONS:
            raise PinnedNumberError(f"the trace depends on {expression}")
        operation, values = _OPERATIONS[name], [self._value(argument) for argument in expression.args]
        return lambda numbers: functools.reduce(operation, (value(numbers) for value in values))


def take_out(root: fx.GraphModule, stand_ins: StandIns, num_left_behind: int) -> Numbers:
    """Take the arithmetic on numbers out of a traced graph.

    Args:
        num_left_behind: the first outputs of the graph are so many numbers, which the step leaves behind.

    Raises:
        PinnedNumberError: a number decides more than comparisons with constants.
    """
    conditions = stand_ins.conditions()
    graph = root.graph
    numeric = [node for node in graph.nodes if torch_internals.is_symbolic(node.meta.get("val"))]
    for node in graph.nodes:
        if node not in numeric and torch_internals.has_symbolic_shape(node.meta.get("val")):
            raise PinnedNumberError(f"{node} has a shape that depends on a number")
    output = next(iter(reversed(graph.nodes)))
    results = list(cast("Sequence[Any]", output.args[0]))
    left_behind, results = results[:num_left_behind], results[num_left_behind:]
    lifted = [node for node in numeric if any(user not in numeric and user is not output for user in node.users)]
    compute = _function_of(graph, numeric, lifted, left_behind)
    reads_slots = not left_behind and all(node.op == "placeholder" for node in numeric)
    output.args = (results,)
    for index, node in enumerate(lifted):
        meta = {"val": node.meta["val"].node.hint, META_KEY: NodeInfo(Role.STATE, f"number {index}")}
        add_placeholder(graph, f"number_{index}", node, meta)
    for node in reversed(numeric):
        graph.erase_node(node)
    return Numbers(stand_ins.slots, compute, conditions, reads_slots)


def _function_of(
    graph: fx.Graph, numeric: Sequence[fx.Node], lifted: Sequence[fx.Node], left_behind: Sequence[Any]
) -> Callable[..., Any]:
    """The function that computes numbers: those lifted, and those left behind."""
    program = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in numeric:
        if any(source not in copies for source in node.all_input_nodes):
            raise PinnedNumberError(f"{node} is read from a tensor")
        copies[node] = program.node_copy(node, copies.__getitem__)
    program.output(map_arg((tuple(lifted), tuple(left_behind)), copies.__getitem__))
    return fx.GraphModule({}, program).forward
