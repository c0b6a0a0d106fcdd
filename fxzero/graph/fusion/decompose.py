"""Composite operators as the pointwise operators and reductions that they are made of, each computed once.

before    n, mean, rstd = native_layer_norm(x, ...)
after     var, mean = var_mean(x) | rstd = rsqrt(var + eps) | n = (x - mean) * rstd * ...
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from fxzero import torch_internals
from fxzero.graph.aliasing import memory_of
from fxzero.graph.fusion.by_comparison import by_comparison
from fxzero.graph.fusion.by_sigmoid import by_sigmoid
from fxzero.graph.fusion.operators import COMPOSITES, is_free
from fxzero.graph.nodes import META_KEY, Role
from fxzero.graph.step import Phase, StepGraph

_KEPT_META = (META_KEY, "stack_trace", "nn_module_stack")


def decompose(step: StepGraph) -> set[fx.Node]:
    """Replace the composite operators of a step; returns the nodes that came in their place."""
    traced: dict[str, fx.GraphModule | None] = {}
    made: set[fx.Node] = set()
    for node in step.nodes(Role.COMPUTE):
        if node.target not in COMPOSITES:
            continue
        key = _key(node)
        if key not in traced:
            own = {**by_sigmoid(node), **by_comparison(node)}
            traced[key] = torch_internals.decomposed(node.target, *_examples(node), own)
        parts = traced[key]
        if parts is not None:
            made |= _splice(step, node, parts)
    return made


def _examples(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])


def _key(node: fx.Node) -> str:
    """Equal for two calls of one operator with tensors of one geometry and equal plain arguments."""

    def text(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype, value.device
        return value

    args, kwargs = torch_internals.tree_map(text, _examples(node))
    return repr((str(node.target), args, sorted(kwargs.items())))


def _splice(step: StepGraph, node: fx.Node, parts: fx.GraphModule) -> set[fx.Node]:
    """Put traced parts in the place of a node; its inputs are theirs, in order."""
    values: dict[fx.Node, Any] = {}
    sources = [each for each in torch_internals.tree_leaves((node.args, node.kwargs)) if isinstance(each, fx.Node)]
    placeholders = parts.graph.find_nodes(op="placeholder")
    values |= dict(zip(placeholders, sources, strict=True))
    made: set[fx.Node] = set()
    with step.graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op == "call_function":
                new = step.graph.node_copy(part, lambda source: values[source])
                new.meta = {"val": part.meta["val"], **{key: node.meta[key] for key in _KEPT_META if key in node.meta}}
                values[part] = new
                made.add(new)
    results = fx.map_arg(cast(Any, parts.graph.output_node().args[0]), lambda source: values[source])
    if len(results) == 1 and not isinstance(node.meta["val"], (tuple, list)):
        node.replace_all_uses_with(results[0])
    else:
        for taken in list(node.users):
            taken.replace_all_uses_with(results[cast(int, taken.args[1])])
            step.graph.erase_node(taken)
    step.graph.erase_node(node)
    for new in sorted(made, reverse=True):
        if not new.users:
            step.graph.erase_node(new)
            made.remove(new)
    return made


def share_equal(step: StepGraph, fusable: set[fx.Node], across: set[fx.Node]) -> None:
    """Let equal fusable operators, and views, of one phase be computed once; two outputs stay two tensors.

    Args:
        fusable: nodes that read no memory which is written.
        across: nodes of backward that may stand for equal ones of forward too; others that look so are recomputed on
            purpose.
    """
    first: dict[Any, fx.Node] = {}
    returned = {memory_of(each) for each in step.model_outputs if isinstance(each, fx.Node)}
    phase_of = step.phase_of()
    for node in step.nodes(Role.COMPUTE):
        is_taken = node.target is operator.getitem and node.args[0] in fusable
        if not (node in fusable or is_taken or is_free(node)):
            continue
        what = (node.target, repr(node.args), repr(node.kwargs))
        here = phase_of[node]
        there = first.get((*what, Phase.FORWARD)) if here is Phase.BACKWARD and node in across else None
        known = there or first.setdefault((*what, here), node)
        if known is node or returned.issuperset((known, node)):
            continue
        if node in returned:
            returned.add(known)
        node.replace_all_uses_with(known)
        step.graph.erase_node(node)
        fusable.discard(node)
