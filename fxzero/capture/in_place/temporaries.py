"""Replace in-place operators on temporaries by functional ones, if nothing else reads the temporary's memory.

Before:  e = empty_like(x) | b = bernoulli_(e, p) | d = div_(b, p) | mul(x, d)
After:   b = bernoulli(x, p) | d = div(b, p) | mul(x, d)

Most models have in-place operators in dropout alone, so that this saves them a second trace (see functional.py).
"""

from typing import Any, cast

import torch
from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import is_in_place, is_random

aten = torch.ops.aten

_ALIASES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})


def make_temporaries_functional(graph: fx.Graph) -> None:
    """Rewrite every in-place operator whose functional form gives an equal result; the others stay."""
    made: set[fx.Node] = set()
    for node in list(graph.nodes):
        if not is_in_place(node):
            continue
        if not _is_unshared(node, made):
            _keep_strides(node)
            continue
        with graph.inserting_before(node):
            result = _functional_form(node)
        if result is not None and not _same_geometry(result, node):
            graph.erase_node(result)
            _keep_strides(node)
        elif result is not None:
            made.add(result)
            node.replace_all_uses_with(result)
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=aten.bernoulli.p):
        source = cast(fx.Node, node.args[0])
        if source.target is aten.empty_like.default and _same_geometry(source, cast(fx.Node, source.args[0])):
            node.update_arg(0, source.args[0])  # bernoulli reads its geometry alone


def _keep_strides(node: fx.Node) -> None:
    """Copy the functional result of an in-place operator onto its target where the two have different strides.

    Functionalization alone would give the target the strides of the result, in whose order later operators round.
    """
    target, op = node.args[0] if node.args else None, torch_internals.functional_form(node.target)
    is_simple = torch_internals.written_names(node.target) == ("self",) and isinstance(target, fx.Node)
    if not is_simple or op is None or node.target is aten.copy_.default or is_random(node):
        return
    with node.graph.inserting_before(node):
        result = _call(node, op, *node.args, **node.kwargs)
    value, own = result.meta["val"], cast(fx.Node, target).meta["val"]
    if (value.shape, value.dtype) != (own.shape, own.dtype) or value.stride() == own.stride():
        node.graph.erase_node(result)
        return
    node.target, node.args, node.kwargs = aten.copy_.default, (target, result), {}


def _is_unshared(node: fx.Node, made: set[fx.Node]) -> bool:
    """True if the node only writes a temporary that has no views and no readers after the node.

    Args:
        made: results of this rewriting, which are temporaries whatever their operator is.
    """
    written = torch_internals.written_names(node.target)
    target = node.args[0] if node.args else None
    if written != ("self",) or not isinstance(target, fx.Node) or torch_internals.num_results(node.target) != 1:
        return False
    if target not in made and not _makes_temporary(target):
        return False
    return not any(_aliases_argument(user) or user > node for user in target.users)


def _makes_temporary(node: fx.Node) -> bool:
    """True if the node's result is one new tensor."""
    if not torch_internals.is_overload(node.target) or _aliases_argument(node) or is_in_place(node):
        return False
    return torch_internals.num_results(node.target) == 1 and isinstance(node.meta.get("val"), Tensor)


def _aliases_argument(node: fx.Node) -> bool:
    """True if the node's result is another tensor on the memory of its first argument."""
    return is_view(node) or node.target in _ALIASES


def _functional_form(node: fx.Node) -> fx.Node | None:
    """A new functional node with the values of an in-place one; None if there is none."""
    target = cast(fx.Node, node.args[0])
    if node.target is aten.copy_.default:
        source = cast(fx.Node, node.args[1])
        return _call(node, aten.clone.default, source) if _same_geometry(source, target) else None
    if node.target is aten.bernoulli_.float:
        return _bernoulli(node, target)
    op = torch_internals.functional_form(node.target)
    return None if op is None else _call(node, op, *node.args, **node.kwargs)


def _bernoulli(node: fx.Node, target: fx.Node) -> fx.Node | None:
    """The functional operator draws for a contiguous tensor, the in-place one in the order of the target's memory."""
    if node.kwargs.get("generator") is not None or len(node.args) > 2:
        return None
    value = cast(Tensor, target.meta["val"])
    keep = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    if value.is_contiguous():
        return _call(node, aten.bernoulli.p, target, keep)
    order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    inverse = sorted(range(value.dim()), key=order.__getitem__)
    if not value.permute(order).is_contiguous():
        return None
    drawn = _call(node, aten.bernoulli.p, _call(node, aten.permute.default, target, order), keep)
    return _call(node, aten.permute.default, drawn, inverse)


def _call(origin: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node with the labels of `origin`, and its own value."""
    result = origin.graph.call_function(target, args, kwargs)
    result.meta = dict(origin.meta)
    result.meta["val"] = torch_internals.fake_result(result)
    return result


def _same_geometry(a: fx.Node, b: fx.Node) -> bool:
    x, y = ((t.shape, t.stride(), t.dtype, t.device, t.layout) for t in (a.meta["val"], b.meta["val"]))
    return x == y
