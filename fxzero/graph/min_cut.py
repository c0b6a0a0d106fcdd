"""Which forward values to save for backward and which to compute again: a minimum cut by bytes, for given pins.

    x (pinned) --> linear (pinned) --> gelu --> dropout mask * ... --> backward reads both ends
                        ^ cut here: save this, recompute gelu in backward

A pinned node is never recomputed: if backward needs its value, or one computed from it, a value on the way is saved.
Parameters, inputs and constants are there in backward anyway.

Source: Chen et al. (arXiv:1604.06174) for recomputing blocks, and the partitioner of functorch for the cut
(min_cut_rematerialization_partition); deviation: pins instead of a ban list per backend, cut piece by piece.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxzero.graph.aliasing import memory_of, written_by
from fxzero.graph.nodes import NodeInfo, Role, info, is_pure, role, tensor_bytes
from fxzero.graph.step import Phase, StepGraph

if TYPE_CHECKING:
    import networkx as nx


class Copies:
    """Copies of forward nodes in backward, each made once, in front of its first reader.

    Args:
        again: the nodes to copy; backward reads other nodes of forward directly.
    """

    def __init__(self, step: StepGraph, again: set[fx.Node]) -> None:
        self._step = step
        self._again = again
        self._missing = set(again)
        self._copies: dict[fx.Node, fx.Node] = {}

    def replace_inputs(self) -> None:
        """Let backward read copies; forward nodes that nothing reads any more are dropped."""
        *_, (_, backward) = self._step.phases()
        for node in backward:
            for source in node.all_input_nodes:
                if source in self._again:
                    with self._step.graph.inserting_before(node):
                        node.replace_input_with(source, self._copy(source))
        for source in reversed([node for node in self._step.graph.nodes if node in self._again and not node.users]):
            self._step.graph.erase_node(source)

    def _copy(self, source: fx.Node) -> fx.Node:
        if source not in self._copies:
            for needed in sorted(self._missing & _all_above({source}, through=self._missing)):
                copy = self._step.graph.node_copy(needed, lambda n: self._copies.get(n, n))
                copy.meta = {**needed.meta, "fxzero": NodeInfo(Role.COMPUTE, info(needed).fqn)}
                self._copies[needed] = copy
                self._missing.remove(needed)
        return self._copies[source]


def read_in_backward(step: StepGraph) -> set[fx.Node]:
    """The forward compute nodes that backward reads, or that are gradients themselves."""
    phase_of = step.phase_of()
    read = {source for node, phase in phase_of.items() if phase is Phase.BACKWARD for source in node.all_input_nodes}
    read |= {grad for grad in (*step.grads.values(), *step.input_grads) if isinstance(grad, fx.Node)}
    return {node for node in read if role(node) is Role.COMPUTE and phase_of[node] is Phase.FORWARD}


def recomputable(step: StepGraph) -> set[fx.Node]:
    """Forward compute nodes that give equal bits when they run again in backward.

    Left out are operators that draw, that write, or that read memory into which another operator writes, or parameters
    that forward writes.
    """
    written = {memory_of(target) for node in step.nodes(Role.COMPUTE) for target in written_by(node)}
    written |= {step.param_nodes()[fqn] for fqn in step.written}
    _, forward = next(step.phases())
    return {
        node
        for node in forward
        if is_pure(node) and not any(memory_of(value) in written for value in (node, *node.all_input_nodes))
    }


def _own_bytes(node: fx.Node) -> int:
    return tensor_bytes(node.meta.get("val"))


def choose_saved(
    step: StepGraph, is_pinned: Callable[[fx.Node], bool], cost: Callable[[fx.Node], int] = _own_bytes
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The forward values that cost the least to save.

    Args:
        is_pinned: true for a node that must not be recomputed; nodes that are not `recomputable` are pinned anyway.
        cost: of saving a value; default: its bytes.

    Returns:
        The values to save, and the nodes that backward computes again from these values.
    """
    _, forward = next(step.phases())
    can = recomputable(step)
    needed = read_in_backward(step)
    above = _all_above(needed)
    compute = [node for node in forward if role(node) is Role.COMPUTE and node in above]
    pinned = {node for node in compute if node not in can or is_pinned(node)}
    import networkx as nx  # takes 10 MB, which most runs do not need

    network: nx.DiGraph[Any] = nx.DiGraph()
    for node in compute:
        # An edge without a capacity is never cut.
        can_be_saved = _can_be_saved(node, pinned) or (node in pinned and node in needed)
        capacity = {"capacity": cost(node)} if can_be_saved else {}
        network.add_edge((node, "in"), (node, "out"), **capacity)
        for source in node.all_input_nodes:
            if source in above and role(source) is Role.COMPUTE and node not in pinned:
                network.add_edge((source, "out"), (node, "in"))
    again: set[fx.Node] = set()
    for piece in nx.weakly_connected_components(network):
        again |= _recomputed(network.subgraph(piece), pinned, needed)
    used = _all_above(needed & again, through=again) | (needed - again)
    saved = {node for node in used if node not in again and role(node) is Role.COMPUTE}
    return saved, used & again


def _can_be_saved(node: fx.Node, pinned: set[fx.Node]) -> bool:
    """False for a tuple of outputs, and for a view that can be computed again: it has no bytes of its own."""
    is_output_of_pinned = node.target is operator.getitem and node.args[0] in pinned
    has_own_bytes = memory_of(node) is node or node in pinned or is_output_of_pinned
    return isinstance(node.meta.get("val"), torch.Tensor) and has_own_bytes


def _recomputed(piece: nx.DiGraph[Any], pinned: set[fx.Node], needed: set[fx.Node]) -> set[fx.Node]:
    """The nodes of one connected piece of the network that lie behind its minimum cut."""
    nodes = [node for node, side in piece if side == "in"]
    if all(node in pinned for node in nodes) or not any(node in needed for node in nodes):
        return set()
    import networkx as nx

    flow: nx.DiGraph[Any] = nx.DiGraph(piece)
    sources = [node for node in nodes if node in pinned]
    flow.add_nodes_from(("source", "sink"))
    flow.add_edges_from(("source", (node, "in")) for node in sources)
    flow.add_edges_from(((node, "out"), "sink") for node in nodes if node in needed)
    _, (_, behind) = nx.minimum_cut(flow, "source", "sink")
    return {node for node in nodes if (node, "in") in behind}


def _all_above(nodes: Iterable[fx.Node], *, through: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes and all that they are computed from. With `through`, the search goes on only above nodes in it."""
    found = set(nodes)
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if through is None or node in through:
            above = set(node.all_input_nodes) - found
            found |= above
            waiting += above
    return found
