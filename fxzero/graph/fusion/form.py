"""Write regions into a step: the fusable nodes of one gap that share a value become one node.

    gap of add, var_mean, rsqrt, mul        region = region(Region, x, y) | add = region[0] | mul = region[1]

Views that a region reads are made inside: it takes what they are views of. Views of its results stay outside. A lone
operator stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import fx

from fxzero.graph import ops
from fxzero.graph.fusion.gaps import anchors, connected, find_gaps, is_transparent
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, info, new_value
from fxzero.graph.regions import Region
from fxzero.graph.step import StepGraph

LEAST_OPS = 2
"""A region of fewer operators is not worth a call."""


def form_regions(step: StepGraph, fusable: set[fx.Node], *, exact: bool = False) -> list[fx.Node]:
    """Replace fusable nodes by the calls of regions, in place; returns the calls.

    Args:
        exact: regions are to compute what their operators do one by one, bit for bit.
    """
    _order(step.graph)
    at = anchors(step, fusable)
    gap = find_gaps(step, fusable, at)
    members: dict[int, list[fx.Node]] = {}
    for node in step.graph.nodes:
        if node in gap:
            members.setdefault(gap[node], []).append(node)
    behind = {number: _last_result(node) for node, number in at.items()}
    begin = _last_given(step.graph)
    calls: list[fx.Node] = []
    for number in sorted(members):
        place = behind.get(number, begin)
        for group in connected(members[number], by_inputs=True):
            made = _Former(step, group, exact).write(place)
            calls += made[:1]
            place = made[-1] if made else _move(group, place)
    _erase_unread(step.graph, fusable)
    _order(step.graph)
    return calls


# -- order -------------------------------------------------------------------------------------------------------------


def _order(graph: fx.Graph) -> None:
    """Move views, and results of several, up or down to right behind what they are taken of."""
    last_taken: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_transparent(node) or not node.all_input_nodes:
            continue
        source: fx.Node = max(node.all_input_nodes)
        if node.target is operator.getitem:
            last_taken.setdefault(source, source).append(node)
            last_taken[source] = node
        elif node < source:
            source.append(node)


def _last_result(node: fx.Node) -> fx.Node:
    """The node behind which all results of an anchor are there."""
    return max((node, *(user for user in node.users if user.target is operator.getitem)))


def _last_given(graph: fx.Graph) -> fx.Node:
    """The last of the placeholders and constants, which stand first."""
    last: fx.Node = next(iter(graph.nodes)).prev
    for node in [node for node in graph.nodes if node.op in ("placeholder", "get_attr")]:
        last.append(node)
        last = node
    return last


def _move(group: Sequence[fx.Node], place: fx.Node) -> fx.Node:
    """Move nodes, with their results of several, behind a node, and views that they read in front of them."""
    for node in group:
        place.append(node)
        _bring_views(node)
        place = node
        for taken in [user for user in node.users if user.target is operator.getitem]:
            place.append(taken)
            place = taken
    return place


def _bring_views(node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if is_transparent(source) and node < source:
            node.prepend(source)
            _bring_views(source)


def _erase_unread(graph: fx.Graph, fusable: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and (node in fusable or is_transparent(node)):
            graph.erase_node(node)


# -- regions -----------------------------------------------------------------------------------------------------------


class _Former:
    """Makes one region of a group of nodes."""

    def __init__(self, step: StepGraph, group: Sequence[fx.Node], exact: bool) -> None:
        self._graph, self._group, self._exact = step.graph, group, exact
        self._inside = set(group)
        self._body = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._inputs: dict[fx.Node, fx.Node] = {}
        """Maps what the region reads to placeholders of its body."""

    def write(self, place: fx.Node) -> list[fx.Node]:
        """Write the call of the region behind a node: the call and its results; nothing if it is too small."""
        if len(self._group) < LEAST_OPS:
            return []
        results = [result for node in self._group for result in self._results(node) if self._is_read_outside(result)]
        if not results:
            return []
        for node in self._group:
            self._copy(node)
        self._body.output(tuple(self._copies[result] for result in results))
        self._body.eliminate_dead_code()
        read = {source: each for source, each in self._inputs.items() if each.users}
        for unread in [each for each in self._inputs.values() if not each.users]:
            self._body.erase_node(unread)
        region = Region.of(self._body, sum(not is_transparent(node) for node in self._group), exact=self._exact)
        return self._call(place, region, list(read), results)

    def _call(self, place: fx.Node, region: Region, inputs: list[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
        with self._graph.inserting_after(place):
            call = self._graph.call_function(ops.region, cast(Any, (region, inputs, [])))
        new_value(call, tuple(result.meta["val"] for result in results))
        call.meta[META_KEY] = NodeInfo(Role.COMPUTE, _module_of(self._group))
        written = [call]
        for index, result in enumerate(results):
            with self._graph.inserting_after(written[-1]):
                taken = self._graph.call_function(operator.getitem, (call, index))
            taken.meta = dict(result.meta)
            result.replace_all_uses_with(taken, delete_user_cb=lambda user: user not in self._inside)
            written.append(taken)
        return written

    def _results(self, node: fx.Node) -> Iterable[fx.Node]:
        """The tensors that a node makes."""
        if isinstance(node.meta["val"], (tuple, list)):
            return [user for user in node.users if user.target is operator.getitem]
        return [node]

    def _is_read_outside(self, result: fx.Node) -> bool:
        """True if a node outside reads a result, if only through a view."""
        for user in result.users:
            if user in self._inside:
                continue
            if not is_transparent(user) or self._is_read_outside(user):
                return True
        return False

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node of the body that computes a value, or stands for it."""
        if node not in self._copies:
            is_made_here = node in self._inside or (is_transparent(node) and self._is_within(node))
            self._copies[node] = self._copy_operator(node) if is_made_here else self._input(node)
        return self._copies[node]

    def _is_within(self, node: fx.Node) -> bool:
        """False for a result of an operator outside, which the region takes as it is."""
        return (
            node.target is not operator.getitem
            or is_transparent(source := node.all_input_nodes[0])
            or (source in self._inside)
        )

    def _copy_operator(self, node: fx.Node) -> fx.Node:
        sources: Mapping[fx.Node, fx.Node] = {source: self._copy(source) for source in node.all_input_nodes}
        return self._body.node_copy(node, lambda source: sources[source])

    def _input(self, node: fx.Node) -> fx.Node:
        if node not in self._inputs:
            last = next(reversed(self._inputs.values()), None)
            with self._body.inserting_before() if last is None else self._body.inserting_after(last):
                placeholder = self._body.placeholder(f"input_{len(self._inputs)}")
            placeholder.meta = {"val": node.meta["val"]}
            self._inputs[node] = placeholder
        return self._inputs[node]


def _module_of(nodes: Sequence[fx.Node]) -> str:
    """The module that most operators of a region belong to."""
    counts = Counter(info(node).fqn for node in nodes if info(node).fqn)
    return counts.most_common(1)[0][0] if counts else ""
