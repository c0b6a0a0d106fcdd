"""A final StepGraph to two straight-line Python functions: no loop, no branch, nothing decided.

    def forward(inputs, buffers):           def backward(saved, tangents):
        (x,) = inputs                           (relu, x) = saved
        all_gather()                            saved.clear()
        wait_all_gather()                       ...
        mm = aten_mm_default(x, t)              write_grad(mm_2)
        ...                                     reduce_scatter()
        return (mm,), [relu, x]                 return (None,)

Names of modules, parameters and buffers may be any text: they stand in comments alone, as `describe` escapes them.

Every parameter, and every view of one, lies at a fixed address, so it is no statement at all but a global that is bound
once (`Code.static`), as are the operators, the collectives and the gradient slots.
"""

import operator
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.names import describe
from fxzero.graph.nodes import Role, role, started_by, written_in_place
from fxzero.graph.regions import is_region, region_inputs, region_of, region_places
from fxzero.graph.step import Phase, StepGraph
from fxzero.memory.activations import PlacedTemporary, static_nodes
from fxzero.planning.lengths.polynomials import Number

_LITERALS = (bool, int, float, str, type(None))
_TORCH_LITERALS = (torch.dtype, torch.layout, torch.memory_format)
_RESERVED = ("forward", "backward", "record_begin", "mark", "torch", "device", "inf", "nan", "complex", "slice")
PLACE_PREFIX = "at_"
"""Before the name of a node: the global of the place in the arena that it writes to."""
CALL_PREFIX = "run_"
"""Before the name of a node: the global of its operator, where each length decides whether it writes to a place."""
NAMES_IN_SOURCE: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf"), "nan": float("nan")}


@dataclass(frozen=True)
class Code:
    """The generated source and what its global names stand for."""

    source: str
    operators: dict[str, Any]
    """Operators and unprintable arguments by global name."""
    static: tuple[fx.Node, ...]
    """Nodes that are bound once, by their names: gathered parameters, gradient slots, views, constants; in order."""
    saved: tuple[fx.Node, ...]
    """What forward hands to backward, in order."""
    placed: tuple[fx.Node, ...] = ()
    """Nodes whose output lies at a fixed place in the arena: the global `at_<node>`."""
    undecided: tuple[fx.Node, ...] = ()
    """Nodes whose output has a place at some lengths: the global `run_<node>` is the operator."""
    _compiled: list[CodeType] = field(default_factory=list[CodeType], repr=False, compare=False)

    def compiled(self) -> CodeType:
        """The source as bytecode, compiled once."""
        if not self._compiled:
            self._compiled.append(compile(self.source, "<fxzero schedule>", "exec"))
        return self._compiled[0]


def generate(
    step: StepGraph,
    placed: Mapping[fx.Node, PlacedTemporary],
    recorded: Collection[fx.Node] = (),
    *,
    record_begin: bool = False,
    marked: Collection[fx.Node] = (),
    saved: tuple[fx.Node, ...] | None = None,
    undecided: Collection[fx.Node] = (),
) -> Code:
    """Write the source of a complete StepGraph.

    Args:
        placed: the temporaries that have a place in the arena.
        recorded: nodes after which an event is recorded, by a call of `record_<node>`; end_forward stands for the begin
            of backward.
        record_begin: call `record_begin` first of all.
        marked: nodes after which `mark` is called, to measure what runs between.
        saved: what forward hands to backward. Default: what backward reads.
        undecided: nodes of which the binding decides whether they write to a place.
    """
    writer = _Writer(step, placed, recorded, marked, undecided)
    phases = dict(step.phases())
    if saved is None:
        saved = _saved(step, phases, writer.static)
    inputs, buffers = step.arguments, step.nodes(Role.BUFFER)
    outputs = [writer.literal(value) for value in step.model_outputs]
    arguments = [writer.free("inputs"), writer.free("buffers")]
    lines = [f"def forward({', '.join(arguments)}):"]
    lines += [*_unpack(inputs, arguments[0]), *_unpack(buffers, arguments[1])]
    lines += ["    record_begin()"] if record_begin else []
    keep = {*saved, *(value for value in step.model_outputs if isinstance(value, fx.Node))}
    lines += writer.body(phases[Phase.FORWARD], [*inputs, *buffers], keep)
    lines += [f"    return {_tuple(outputs)}, [{', '.join(node.name for node in saved)}]"]
    if step.has_backward:
        tangents = step.nodes(Role.TANGENT)
        grads = [grad for grad in step.input_grads if isinstance(grad, fx.Node)]
        arguments = [writer.free("saved"), writer.free("tangents")]
        lines += ["", "", f"def backward({', '.join(arguments)}):"]
        for nodes, argument in zip((saved, tangents), arguments, strict=True):
            lines += [*_unpack(nodes, argument), f"    {argument}.clear()"]
        if (boundary := step.end_forward) is not None and boundary in writer.recorded:
            lines.append(f"    {writer.record(boundary)}")
        lines += writer.body(phases[Phase.BACKWARD], [*saved, *tangents], set(grads))
        lines += [f"    return {_tuple([writer.literal(grad) for grad in step.input_grads])}"]
    return Code(
        "\n".join(lines) + "\n", writer.operators, tuple(writer.static), saved, tuple(writer.placed), tuple(undecided)
    )


def _saved(step: StepGraph, phases: dict[Phase, list[fx.Node]], static: dict[fx.Node, None]) -> tuple[fx.Node, ...]:
    """The nodes before backward that backward reads, in order; views of parameters are never among them."""
    backward = set(phases.get(Phase.BACKWARD, ()))
    read = {source for node in backward for source in torch_internals.input_nodes(node)}
    read |= {grad for grad in step.input_grads if isinstance(grad, fx.Node)}
    before = (Role.INPUT, Role.STATE, Role.BUFFER, Role.COMPUTE)
    return tuple(
        node
        for node in step.graph.nodes
        if node in read and node not in backward and role(node) in before and node not in static
    )


def _unpack(nodes: Sequence[fx.Node], source: str) -> list[str]:
    return [f"    {_tuple([node.name for node in nodes])} = {source}"] if nodes else []


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


@dataclass
class _Writer:
    """Turns nodes into lines, and collects the globals that the lines name."""

    step: StepGraph
    placed: Mapping[fx.Node, PlacedTemporary]
    recorded: Collection[fx.Node] = ()
    marked: Collection[fx.Node] = ()
    undecided: Collection[fx.Node] = ()
    operators: dict[str, Any] = field(default_factory=dict[str, Any])
    static: dict[fx.Node, None] = field(default_factory=dict[fx.Node, None])

    def __post_init__(self) -> None:
        self.static = dict.fromkeys(static_nodes(self.step))
        self._taken = {*_RESERVED, *(node.name for node in self.step.graph.nodes)}
        self._in_place = {slot for slot in self.step.nodes(Role.WRITE_GRAD) if written_in_place(slot)}
        """These are no statements, and read nothing."""
        self._names: dict[int, str] = {}
        """The globals that stand for operators, by the ids of these."""

    def free(self, name: str) -> str:
        """A name that no node has."""
        while name in self._taken:
            name += "_"
        return name

    def body(self, nodes: Sequence[fx.Node], given: Iterable[fx.Node], keep: set[fx.Node]) -> list[str]:
        """The statements of one phase; each local is deleted after its last reader, except those in `keep`."""
        last_use: dict[fx.Node, fx.Node] = {}
        local = {*given}
        for node in nodes:
            if role(node) is Role.COMPUTE and node not in self.static:
                local.add(node)
            sources = torch_internals.input_nodes(node)
            last_use.update(dict.fromkeys(filter(self._is_read, sources) if node in self._in_place else sources, node))
        dies_at: dict[fx.Node, list[str]] = {}
        for source, reader in last_use.items():
            if source in local and source not in keep:
                dies_at.setdefault(reader, []).append(source.name)
        lines: list[str] = []
        for node in nodes:
            statement = self.statement(node)
            if statement:
                lines.append(f"    {statement}")
            if node in self.recorded:
                lines.append(f"    {self.record(node)}")
            if node in dies_at:
                lines.append(f"    del {', '.join(dies_at[node])}")
            if node in self.marked:
                lines.append("    mark()")
        return lines

    def _is_read(self, node: fx.Node) -> bool:
        """False for a value that nothing reads."""
        return not self._in_place.issuperset(node.users)

    def record(self, node: fx.Node) -> str:
        """The call that records an event."""
        return f"record_{node.name}()"

    def statement(self, node: fx.Node) -> str:
        """What a node does; empty where it does nothing in a step."""
        kind = role(node)
        if node in self.static or node in self._in_place:
            return ""
        if kind is Role.RELEASE:
            return f"# {describe(node)[1:-1]}"
        if kind is Role.ALL_GATHER or kind is Role.REDUCE_SCATTER:
            return f"{node.name}()  # {describe(node)[1:-1]}"
        if kind is Role.WAIT:
            return f"wait_{started_by(node).name}()"
        if kind is Role.WRITE_GRAD:
            grads = [self.literal(source) for source in node.all_input_nodes]
            return f"{node.name}({', '.join(grads)})"
        if node.target is operator.getitem:
            return f"{node.name} = {self.literal(node.args[0])}[{self.literal(node.args[1])}]"
        arguments = [self.literal(arg) for arg in node.args]
        arguments += [f"{name}={self.literal(arg)}" for name, arg in node.kwargs.items()]
        result = f"{node.name} = " if self._is_read(node) else ""
        if is_region(node):
            given = [*region_inputs(node), *region_places(node)]
            return f"{result}{self.operator(region_of(node))}({self.literal(given)})"
        if node in self.undecided:
            return f"{result}{CALL_PREFIX}{node.name}({', '.join(arguments)})"
        if node in self.placed:
            target, out = self.placed[node].variant
            arguments.append(f"{out}={PLACE_PREFIX}{node.name}")
            return f"{result}{self.operator(target)}({', '.join(arguments)})"
        return f"{result}{self.operator(node.target)}({', '.join(arguments)})"

    def operator(self, target: Any) -> str:
        """The global that stands for an operator."""
        name = self._names.get(id(target))
        if name is None:
            name = self._names[id(target)] = self._new_global(target)
        return name

    def _new_global(self, target: Any) -> str:
        is_overload = torch_internals.is_overload(target)
        called = str(target) if is_overload else getattr(target, "__name__", "operator")
        name = self.free(re.sub(r"\W", "_", called))
        while self.operators.setdefault(name, target) is not target:
            name = self.free(f"{name}_")
        return name

    def literal(self, value: Any) -> str:
        """Source text for an argument."""
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (list, tuple)):
            items = [self.literal(item) for item in value]
            return f"[{', '.join(items)}]" if isinstance(value, list) else _tuple(items)
        if isinstance(value, slice):
            return f"slice({self.literal(value.start)}, {self.literal(value.stop)}, {self.literal(value.step)})"
        if isinstance(value, torch.device):
            return f"device({str(value)!r})"
        if type(value) is Number:
            return value.name
        if type(value) in _LITERALS or isinstance(value, _TORCH_LITERALS):
            return repr(value)
        if isinstance(value, complex):
            return f"complex({value.real!r}, {value.imag!r})"
        name = self.free(f"constant_{len(self.operators)}")
        self.operators[name] = value
        return name
