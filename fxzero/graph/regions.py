"""A region: operators of a step that are compiled together and run as one node.

    before    var_mean = var_mean(x) | add = var + eps | rsqrt = rsqrt(add) | sub = x - mean | mul = sub * rsqrt
    after     region = region(Region, x) | mul = region[0] | rsqrt = region[1]

What its operators compute on tensors of these geometries is all that a region is: equal ones have equal keys, in
every layer, process and rank, and are compiled once.

A result may have a place: memory that the region is given and writes the result to, as a gradient to its bucket.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import fx, nn

from fxzero.graph import ops

Geometry = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, str]
"""Shape, strides, dtype and type of device of a tensor."""


@dataclass(frozen=True)
class Region:
    """The operators of a region, as a graph of their own."""

    body: fx.Graph = field(repr=False, compare=False)
    """Placeholders for what the region reads, operators and views, and a tuple of results, all with `meta["val"]`."""
    num_ops: int = field(compare=False)
    """Number of operators, views aside."""
    key: str
    """Equal for equal regions."""
    placed: tuple[int, ...] = ()
    """Indices of the results of the body that are written to places, in ascending order."""
    exact: bool = False
    """True if what is compiled must compute what the operators do one by one, bit for bit."""

    @classmethod
    def of(cls, body: fx.Graph, num_ops: int, placed: tuple[int, ...] = (), *, exact: bool = False) -> Region:
        """The region of a graph that does not change any more."""
        return cls(body, num_ops, _key(body, placed, exact), placed, exact)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """All results of the body."""
        return cast("tuple[fx.Node, ...]", self.body.output_node().args[0])

    @property
    def returned(self) -> list[int]:
        """Indices of the results that have no places: what a call returns."""
        return [index for index in range(len(self.results)) if index not in self.placed]

    @property
    def __name__(self) -> str:
        """Names the region in generated code."""
        return f"fused_{self.key[:8]}"

    @property
    def inputs(self) -> list[torch.Tensor]:
        """Tensors of the geometries that it reads."""
        return [node.meta["val"] for node in self.body.find_nodes(op="placeholder")]

    @property
    def places(self) -> list[torch.Tensor]:
        """Tensors of the geometries of its places."""
        return [self.results[index].meta["val"] for index in self.placed]

    @property
    def examples(self) -> list[torch.Tensor]:
        """Tensors of the geometries that it takes: inputs, then places."""
        return self.inputs + self.places

    def __call__(self, given: Sequence[torch.Tensor]) -> list[Any]:
        """Run the operators one by one.

        Args:
            given: the inputs, then the places.
        """
        num_inputs = len(given) - len(self.placed)
        results = self._code(*given[:num_inputs])
        for index, place in zip(self.placed, given[num_inputs:], strict=True):
            place.copy_(results[index])
        return [results[index] for index in self.returned]

    @functools.cached_property
    def _code(self) -> Callable[..., Any]:
        """The body as Python code."""
        copied = fx.Graph()
        copied.output(copied.graph_copy(self.body, {}))
        return fx.GraphModule(nn.Module(), copied).forward

    @functools.cached_property
    def read_by(self) -> tuple[frozenset[int], ...]:
        """For each result of the body, the indices of the inputs that it is computed from."""
        above: dict[fx.Node, frozenset[int]] = {}
        for index, node in enumerate(self.body.find_nodes(op="placeholder")):
            above[node] = frozenset([index])
        for node in self.body.nodes:
            above.setdefault(node, frozenset[int]().union(*(above[source] for source in node.all_input_nodes)))
        return tuple(above[result] for result in self.results)


def is_region(node: fx.Node) -> TypeGuard[fx.Node]:
    """True for the call of a region."""
    return node.target is ops.region


def region_of(node: fx.Node) -> Region:
    """The region that a node calls."""
    return cast(Region, node.args[0])


def region_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """What the call of a region reads, in order."""
    return cast("tuple[fx.Node, ...]", node.args[1])


def region_places(node: fx.Node) -> tuple[fx.Node, ...]:
    """The places that the call of a region writes to, in order."""
    return cast("tuple[fx.Node, ...]", node.args[2])


def inputs_of_result(taken: fx.Node) -> set[fx.Node]:
    """What one returned result of a region is computed from."""
    call, index = cast("tuple[fx.Node, int]", taken.args)
    return _inputs_of(call, region_of(call).returned[index])


def inputs_of_place(call: fx.Node, place: fx.Node) -> set[fx.Node]:
    """What is computed for one place of a region."""
    return _inputs_of(call, region_of(call).placed[region_places(call).index(place)])


def _inputs_of(call: fx.Node, index: int) -> set[fx.Node]:
    inputs = region_inputs(call)
    return {inputs[each] for each in region_of(call).read_by[index]}


def give_place(taken: fx.Node, place: fx.Node) -> None:
    """Let a region write a returned result, which nothing reads any more, to a place; the result is erased."""
    call, index = cast("tuple[fx.Node, int]", taken.args)
    region = region_of(call)
    placed = dict(zip(region.placed, region_places(call), strict=True)) | {region.returned[index]: place}
    placed = dict(sorted(placed.items()))
    call.graph.erase_node(taken)
    for other in list(call.users):
        other_index = cast(int, other.args[1])
        other.args = (call, other_index - (other_index > index))
    written = Region.of(region.body, region.num_ops, tuple(placed), exact=region.exact)
    call.args = (cast(Any, written), call.args[1], list(placed.values()))
    call.meta["val"] = tuple(value for each, value in enumerate(call.meta["val"]) if each != index)


def geometry(tensor: torch.Tensor) -> Geometry:
    """What a region is compiled for."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type


def _key(body: fx.Graph, placed: tuple[int, ...], exact: bool) -> str:
    """A hash of the operators with numbered operands, and of the geometries of what they read and return."""
    number = {node: index for index, node in enumerate(body.nodes)}
    lines: list[Any] = []
    for node in body.nodes:
        args = fx.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}")
        is_placeholder = node.op == "placeholder"
        lines.append(geometry(node.meta["val"]) if is_placeholder else (str(node.target), repr(args)))
    lines += [geometry(result.meta["val"]) for result in body.output_node().all_input_nodes]
    what = (lines, placed, "exact") if exact else (lines, placed)
    return hashlib.sha256(repr(what).encode()).hexdigest()
