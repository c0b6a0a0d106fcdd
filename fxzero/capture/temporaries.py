"""Replace in-place operators on temporaries by functional ones, where nothing else sees the temporary's memory.

Before:  e = empty_like(x) | b = bernoulli_(e, p) | d = div_(b, p) | mul(x, d)
After:   b = bernoulli(x, p) | d = div(b, p) | mul(x, d)

It spares most models, whose only in-place operators are dropout's, a second trace (see functional.py).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.graph.aliasing import is_view

aten = torch.ops.aten

_ALIASES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})


def is_in_place(node: fx.Node) -> bool:
    """True if the node writes into its arguments."""
    return torch_internals.is_overload(node.target) and torch_internals.is_mutable(node.target)


def aliases_argument(node: fx.Node) -> bool:
    """True if the node's result is another tensor on the memory of its first argument."""
    return is_view(node) or node.target in _ALIASES


def make_temporaries_functional(graph: fx.Graph) -> None:
    """Rewrite every in-place operator for which that is exact; the others stay."""
    positions = {node: index for index, node in enumerate(graph.nodes)}
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        if is_in_place(node) and _is_unshared(node, positions, made):
            with graph.inserting_before(node):
                result = _functional_form(graph, node)
            if result is not None:
                made.add(result)
                node.replace_all_uses_with(result)
                graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.bernoulli.p):
        source = cast(fx.Node, node.args[0])
        if source.target is aten.empty_like.default and _same_geometry(source, cast(fx.Node, source.args[0])):
            node.update_arg(0, source.args[0])  # only its geometry counts


def _is_unshared(node: fx.Node, positions: dict[fx.Node, int], made: set[fx.Node]) -> bool:
    """True if the node writes nothing but a temporary that no view, and nothing after the node, reads.

    `made` are results of this rewriting, which are temporaries whatever their operator.
    """
    written = torch_internals.written_names(node.target)
    target = node.args[0] if node.args else None
    if written != ("self",) or not isinstance(target, fx.Node) or torch_internals.num_results(node.target) != 1:
        return False
    if target not in made and not _makes_temporary(target):
        return False
    here = positions.get(node, 0)
    return not any(
        aliases_argument(user) or (user is not node and positions.get(user, 0) > here) for user in target.users
    )


def _makes_temporary(node: fx.Node) -> bool:
    """True if the node's result is one new tensor."""
    if not torch_internals.is_overload(node.target) or aliases_argument(node) or is_in_place(node):
        return False
    return torch_internals.num_results(node.target) == 1 and isinstance(node.meta.get("val"), Tensor)


def _functional_form(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    target = cast(fx.Node, node.args[0])
    if node.target is aten.copy_.default:
        if not _same_geometry(cast(fx.Node, node.args[1]), target):
            return None
        return _with_value(graph, graph.call_function(aten.clone.default, (node.args[1],)), node)
    if node.target is aten.bernoulli_.float:
        return _bernoulli(graph, node, target)
    op = torch_internals.functional_form(node.target)
    if op is None:
        return None
    result = graph.call_function(op, node.args, node.kwargs)
    return _with_value(graph, result, node)


def _bernoulli(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node | None:
    """The functional operator draws for a contiguous tensor, the in-place one in the order of the target's memory."""
    if node.kwargs.get("generator") is not None or len(node.args) > 2:
        return None
    value = cast(Tensor, target.meta["val"])
    keep = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    if value.is_contiguous():
        return _with_value(graph, graph.call_function(aten.bernoulli.p, (target, keep)), node)
    order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    inverse = sorted(range(value.dim()), key=order.__getitem__)
    if not value.permute(order).is_contiguous():
        return None
    dense = _with_value(graph, graph.call_function(aten.permute.default, (target, order)), node)
    drawn = _with_value(graph, graph.call_function(aten.bernoulli.p, (dense, keep)), node)
    assert drawn is not None
    return _with_value(graph, graph.call_function(aten.permute.default, (drawn, inverse)), node)


def _with_value(graph: fx.Graph, result: fx.Node, origin: fx.Node) -> fx.Node | None:
    """Label a new node; None, and no node, if its result has another geometry than what it replaces."""
    result.meta = dict(origin.meta)
    result.meta["val"] = value = torch_internals.fake_result(result)
    final = result.target is not aten.permute.default and result.args[0] is origin.args[0]
    if final and not _same(value, origin.meta["val"]):
        graph.erase_node(result)
        return None
    return result


def _same_geometry(a: fx.Node, b: fx.Node) -> bool:
    return _same(a.meta["val"], b.meta["val"])


def _same(a: Any, b: Any) -> bool:
    geometry = [(t.shape, t.stride(), t.dtype, t.device, t.layout) for t in (a, b)]
    return geometry[0] == geometry[1]
