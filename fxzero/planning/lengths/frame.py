"""A graph with Numbers in the place of integers that depend on the length, and the graph of one length.

nodes, skeleton, integers      scan(step)                       three steps of one skeleton give one frame
frame                          Frame.of(step, integers)         the graph of the last of them, Numbers in its arguments
step                           frame.at(values)                 the graph of a length, as passes would have made it
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.graph.nodes import Role, info, role
from fxzero.graph.step import StepGraph, copy_of
from fxzero.planning.lengths.polynomials import Number, value_of

_PLAIN = (str, torch.dtype, torch.device, torch.layout, torch.memory_format, complex, type(None), bool)


@dataclass
class Scan:
    """What a step is, apart from its integers."""

    skeleton: list[Any]
    integers: list[int]


def scan(step: StepGraph) -> Scan:
    """Take a step apart: its operators, edges and constants, and the integers of arguments and geometries."""
    index = {node: i for i, node in enumerate(step.graph.nodes)}
    storages: dict[int, int] = {}
    integers: list[int] = []

    def of_argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return fx.Node, index[value]
        if type(value) is int:
            integers.append(value)
            return int
        if isinstance(value, (list, tuple)):
            return (list, *map(of_argument, cast("list[Any]", value)))
        if isinstance(value, dict):
            return (dict, *((key, of_argument(each)) for key, each in cast("dict[str, Any]", value).items()))
        if isinstance(value, slice):
            return slice, of_argument(value.start), of_argument(value.stop), of_argument(value.step)
        if isinstance(value, float):
            return float, value.hex()
        return value

    def of_value(value: Any) -> Any:
        if isinstance(value, Tensor):
            number = torch_internals.storage_id(value)
            integers.extend(torch_internals.geometry_of(value))
            return value.dim(), value.dtype, value.device, storages.setdefault(number, len(storages))
        if isinstance(value, (list, tuple)):
            return (list, *map(of_value, cast("list[Any]", value)))
        return of_argument(value)

    skeleton = [
        (
            node.op,
            node.target if node.op == "call_function" else str(node.target),
            of_argument(node.args),
            of_argument(node.kwargs),
            of_value(_value_of(node)),
            info(node),
        )
        for node in step.graph.nodes
    ]
    return Scan(skeleton, integers)


def _value_of(node: fx.Node) -> Any:
    """The fake value of a node; of a number of the Python state, which is an input, its type alone."""
    value = node.meta.get("val")
    return type(value) if role(node) is Role.STATE and not isinstance(value, Tensor) else value


class Geometry(tuple[Any, ...]):
    """Shape, stride, offset, dtype, device and number of the storage of a tensor; Numbers may stand for integers."""

    __slots__ = ()

    @property
    def key(self) -> Any:
        """Equal for geometries that are equal at all lengths; Numbers themselves are equal as soon as one value is."""
        shape, stride, offset, dtype, device, _ = self
        numbers = [(n.index, "number") if type(n) is Number else n for n in (*shape, *stride, offset)]
        return (*numbers, dtype, device)


class Frame:
    """The graph of a family's steps."""

    def __init__(self, step: StepGraph, integers: Sequence[int]) -> None:
        """
        Args:
            step: the one of the last length.
            integers: its integers in the order of `scan`, with Numbers in the place of those that depend on the length.
        """
        self.step = step = copy_of(step)
        remaining = iter(integers)
        storages: dict[int, int] = {}
        self.values: dict[fx.Node, Any] = {}
        """The geometry of each node's value."""
        for node in step.graph.nodes:
            args = _mapped(node.args, lambda _: next(remaining))
            kwargs = _mapped(node.kwargs, lambda _: next(remaining))
            if any_number((args, kwargs)):
                node.args, node.kwargs = args, kwargs
            self.values[node] = _geometries(_value_of(node), remaining, storages)
        self.sizes = {index for value in self.values.values() for index in _numbers_of_sizes(value)}
        """The polynomials that are sizes of dimensions."""
        self._varying = self._varying_storages()

    def _varying_storages(self) -> set[int]:
        """Storages with a tensor that depends on the length, or that lie in one value with such."""
        groups = [[each for each in _tensors_in(value)] for value in self.values.values()]
        varying = {each[-1] for group in groups for each in group if any_number(tuple(each))}
        num = -1
        while num != len(varying):
            num = len(varying)
            for group in groups:
                own = {each[-1] for each in group}
                varying |= set[int]() if own.isdisjoint(varying) else own
        return varying

    def at(self, values: Sequence[int]) -> tuple[StepGraph, dict[fx.Node, fx.Node]]:
        """The step of a length, and where each node of the frame went.

        Args:
            values: of each polynomial at the length.
        """
        step = copy_of(self.step)
        nodes = dict(zip(self.step.graph.nodes, step.graph.nodes, strict=True))
        storages: dict[int, Tensor] = {}
        extents = self._extents(values)
        with torch_internals.fake_tensor_mode():
            for frame_node, node in nodes.items():
                if any_number((node.args, node.kwargs)):
                    node.args = with_values(node.args, values)
                    node.kwargs = with_values(node.kwargs, values)
                if any(each[-1] in self._varying for each in _tensors_in(self.values[frame_node])):
                    node.meta["val"] = _rebuilt(self.values[frame_node], values, storages, extents)
        return step, nodes

    def _extents(self, values: Sequence[int]) -> dict[int, int]:
        """Bytes of each storage."""
        extents: dict[int, int] = {}
        for value in self.values.values():
            for each in _tensors_in(value):
                shape, stride, offset, dtype, _, storage = with_values(tuple(each), values)
                last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                nbytes = (offset + last + 1) * dtype.itemsize if 0 not in shape else 0
                extents[storage] = max(extents.get(storage, 0), nbytes)
        return extents


def any_number(value: Any) -> bool:
    """True if a Number is somewhere in nested tuples, lists, dicts and slices."""
    if type(value) is Number:
        return True
    if isinstance(value, (list, tuple)):
        return any(map(any_number, cast("list[Any]", value)))
    if isinstance(value, dict):
        return any(map(any_number, cast("dict[Any, Any]", value).values()))
    return isinstance(value, slice) and any_number((value.start, value.stop, value.step))


def with_values(value: Any, values: Sequence[int]) -> Any:
    """An argument with the value of each Number in its place."""
    return _mapped(value, lambda number: value_of(number, values))


def _mapped(value: Any, change: Callable[[int], int]) -> Any:
    """An argument with other integers."""
    if type(value) is int or type(value) is Number:
        return change(value)
    if isinstance(value, Geometry):
        return Geometry(_mapped(each, change) for each in value)
    if isinstance(value, (list, tuple)):
        made = [_mapped(each, change) for each in cast("list[Any]", value)]
        return made if isinstance(value, list) else tuple(made)
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, slice):
        return slice(_mapped(value.start, change), _mapped(value.stop, change), _mapped(value.step, change))
    return value


def _geometries(value: Any, integers: Iterator[int], storages: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        shape = tuple(next(integers) for _ in value.shape)
        stride = tuple(next(integers) for _ in value.shape)
        number = torch_internals.storage_id(value)
        storage = storages.setdefault(number, len(storages))
        return Geometry((shape, stride, next(integers), value.dtype, value.device, storage))
    if isinstance(value, (list, tuple)):
        made = [_geometries(each, integers, storages) for each in cast("list[Any]", value)]
        return made if isinstance(value, list) else tuple(made)
    return _mapped(value, lambda _: next(integers))


def _tensors_in(value: Any) -> Iterator[Geometry]:
    if isinstance(value, Geometry):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in cast("list[Any]", value):
            yield from _tensors_in(each)


def _numbers_of_sizes(value: Any) -> Iterator[int]:
    for each in _tensors_in(value):
        yield from (size.index for size in each[0] if type(size) is Number)


def _rebuilt(value: Any, values: Sequence[int], storages: dict[int, Tensor], extents: dict[int, int]) -> Any:
    """Tensors of a geometry; those of one storage share it."""
    if isinstance(value, Geometry):
        shape, stride, offset, dtype, device, storage = with_values(tuple(value), values)
        if storage not in storages:
            storages[storage] = torch.empty(-(-extents[storage] // 16) * 16, dtype=torch.uint8, device=device)
        return storages[storage].view(dtype).as_strided(shape, stride, offset)
    if isinstance(value, (list, tuple)):
        made = [_rebuilt(each, values, storages, extents) for each in cast("list[Any]", value)]
        return made if isinstance(value, list) else tuple(made)
    return with_values(value, values)
