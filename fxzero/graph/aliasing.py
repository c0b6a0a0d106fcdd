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
    for node in graph.nodes:
        source = _given_memory(node) if node.op == "call_function" else None
        found[node] = node if source is None else found[source]
    return found


def _given_memory(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the node returns; None if the node allocates its result."""
    maker = node
    if node.target is operator.getitem:
        maker = cast(fx.Node, node.args[0])
        if is_view(maker) or role(maker) is Role.WAIT:
            return maker
    target = cast(Any, maker.target)
    if not torch_internals.is_overload(target) or not maker.args:
        return None
    is_view_by_name = is_view(node) or target is torch.ops.aten._unsafe_view.default
    if maker is node and (is_view_by_name or torch_internals.is_mutable(target)):
        into = node.kwargs.get("out", node.args[0])
        return into if isinstance(into, fx.Node) else None
    # Some results (of unsafe_split, say) are views that no schema declares; the traced values share storage, though.
    value = node.meta.get("val")
    return next(
        (source for source in maker.all_input_nodes if torch_internals.same_storage(value, source.meta.get("val"))),
        None,
    )


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
