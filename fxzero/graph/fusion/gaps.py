"""Where the operators of regions run: each in a gap between two of the operators that stay as they are.

    gap 0 | mm | gap 1 | attention | gap 2 | mm | gap 3 ...

The others, anchors, keep their order. A gap is a place in it, so that no region can wait for itself, whatever it is
made of.

early     an operator runs as soon as its inputs are there: behind the product that it follows
late      what backward computes of forward's values alone, and what is computed of parameters alone, runs where it is
          first read; else all layers' would run, and be held, when the phase begins
joining   pointwise operators that only later regions read run with the first of them
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import cast

from torch import fx

from fxzero.graph.fusion.operators import is_free, is_reduction
from fxzero.graph.step import StepGraph


def is_transparent(node: fx.Node) -> bool:
    """True for views, constants and results taken of several, which run nowhere."""
    return node.target is operator.getitem or is_free(node)


def maker(node: fx.Node) -> fx.Node:
    """The operator, or the input of the step, that a value is made by, through views and results of several."""
    while node.target is operator.getitem or (is_free(node) and node.all_input_nodes):
        node = cast(fx.Node, node.args[0])
    return node


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views and results of several."""
    for user in node.users:
        if is_transparent(user):
            yield from readers(user)
        else:
            yield user


def anchors(step: StepGraph, fusable: set[fx.Node]) -> dict[fx.Node, int]:
    """The number of each anchor, from 1 on."""
    nodes = (node for node in step.graph.nodes if node.op == "call_function")
    found = (node for node in nodes if node not in fusable and not is_transparent(node))
    return {node: number for number, node in enumerate(found, start=1)}


def find_gaps(step: StepGraph, fusable: set[fx.Node], at: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The number of the anchor behind which each fusable node runs; nodes of forward stay in forward.

    Args:
        at: the anchors.
    """
    boundary = step.end_forward
    edge = len(at) + 1 if boundary is None else at[boundary]
    gap, late = _earliest(step, fusable, at, edge)

    def first_read(node: fx.Node) -> int:
        """The gap of what reads a node first, 0 for a node that is only returned."""
        return min((gap[each] if each in gap else at.get(each, len(at) + 1) - 1 for each in readers(node)), default=0)

    for node in reversed(step.graph.nodes):
        if node in late:
            until = first_read(node)
            gap[node] = max(gap[node], min(until, edge - 1) if gap[node] < edge else until)
    for number in sorted(set(gap.values()), reverse=True):
        for together in connected([node for node in gap if gap[node] == number]):
            inside = set(together)
            outside = [(node, each) for node in together for each in readers(node) if each not in inside]
            if not outside or any(each not in gap for _, each in outside):
                continue
            until = min(gap[each] for _, each in outside)
            stays_in_phase = (until < edge) == (number < edge)
            if stays_in_phase and (len(together) == 1 or not any(map(is_reduction, together))):
                gap.update(dict.fromkeys(together, until))
    return gap


def connected(nodes: Sequence[fx.Node], *, by_inputs: bool = False) -> list[list[fx.Node]]:
    """Nodes in groups: those together that read each other's values.

    Args:
        by_inputs: those too that read values of one operator outside.
    """
    leader = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    reads: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            made_by = maker(source)
            if made_by in leader:
                leader[find(node)] = find(made_by)
            elif by_inputs and made_by.op == "call_function":
                leader[find(node)] = find(reads.setdefault(made_by, node))
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _earliest(
    step: StepGraph, fusable: set[fx.Node], at: dict[fx.Node, int], edge: int
) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """The first gap of each fusable node, and the nodes that run late instead.

    Args:
        edge: the number of the anchor that ends forward.
    """
    early: dict[fx.Node, int] = {}
    gap: dict[fx.Node, int] = {}
    late, from_params = set[fx.Node](), set(step.param_nodes().values())
    boundary = step.end_forward
    for node in step.graph.nodes:
        sources = node.all_input_nodes
        early[node] = at[node] if node in at else max((early[source] for source in sources), default=0)
        if sources and node not in at and from_params.issuperset(sources):
            from_params.add(node)
        if node in fusable:
            is_backward = boundary is not None and boundary < node
            gap[node] = max(early[node], edge) if is_backward else early[node]
            if node in from_params or (is_backward and early[node] <= edge):
                late.add(node)
    return gap, late
