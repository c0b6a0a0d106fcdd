"""Which values of a step share memory: views, and results of operators that write into an argument."""

import functools
import operator
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.nodes import Role, is_in_place, role


def is_view(node: fx.Node) -> bool:
    """True for an operator whose only effect is another view of its first argument."""
    return _makes_a_view(node.target)


@functools.cache
def _makes_a_view(target: Any) -> bool:
    return torch_internals.is_overload(target) and target.is_view and not torch_internals.is_mutable(target)


def base(node: fx.Node) -> fx.Node:
    """The node that a view is taken of, through views of views; a node that is no view is its own base."""
    while is_view(node) or (node.target is operator.getitem and is_view(cast(fx.Node, node.args[0]))):
        node = cast(fx.Node, node.args[0])
    return node


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory of a node's value, through views and operators that write into an argument."""
    while (source := _given_memory(node)) is not None:
        node = source
    return node


def memories(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """`memory_of` of all nodes of a graph."""
    found: dict[fx.Node, fx.Node] = {}
    storages: dict[int, int] = {}
    for node in graph.nodes:
        source = _given_memory(node, storages) if node.op == "call_function" else None
        found[node] = node if source is None else found[source]
    return found


def _given_memory(node: fx.Node, storages: dict[int, int] | None = None) -> fx.Node | None:
    """The argument whose memory the node returns; None if the node allocates its result.

    Args:
        storages: those of values by their ids, as far as they are known; equal blocks have the same values.
    """
    maker = node
    if node.target is operator.getitem:
        maker = cast(fx.Node, node.args[0])
        if is_view(maker) or role(maker) is Role.WAIT:
            return maker
    args = maker.args
    if not args or not torch_internals.is_overload(maker.target):
        return None
    if maker is node and _returns_an_argument(maker.target):
        into = node.kwargs.get("out", args[0])
        return into if isinstance(into, fx.Node) else None
    # Some results (of unsafe_split, say) are views that no schema declares; the traced values share storage, though.
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    known = {} if storages is None else storages
    storage = _storage(value, known)
    for source in torch_internals.input_nodes(maker):
        given = source.meta.get("val")
        if isinstance(given, torch.Tensor) and _storage(given, known) == storage:
            return source
    return None


def _storage(value: torch.Tensor, known: dict[int, int]) -> int:
    found = known.get(id(value))
    if found is None:
        found = known[id(value)] = torch_internals.storage_id(value)
    return found


@functools.cache
def _returns_an_argument(target: Any) -> bool:
    """True for an overload that returns a view of its first argument, or what it writes to."""
    is_view_by_name = _makes_a_view(target) or target is torch.ops.aten._unsafe_view.default
    return is_view_by_name or torch_internals.is_mutable(target)


def aliases(node: fx.Node) -> list[fx.Node]:
    """The node, its views, and views of its views, in discovery order."""
    found = [node]
    for alias in found:
        for user in alias.users:
            from_view = user.target is operator.getitem and is_view(alias)
            if (from_view or (is_view(user) and user.args[0] is alias)) and user not in found:
                found.append(user)
    return found


def in_memory_of(node: fx.Node) -> list[fx.Node]:
    """The node and every value in its memory: its aliases, and the results of operators that write into it."""
    found = [node]
    for value in found:
        found += [user for user in value.users if _given_memory(user) is value and user not in found]
    return found


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to."""
    written: list[fx.Node] = []
    if is_in_place(node):
        arguments = [torch_internals.argument(node, name) for name in torch_internals.written_names(node.target)]
        fx.map_arg(arguments, written.append)
    return written
