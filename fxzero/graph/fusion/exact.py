"""Which operators may stand in the regions of exact compute: those that IEEE 754 defines to the last bit.

inside      additions, products, quotients, roots, comparisons, and what moves or converts numbers: one result is right,
            whether a loop or a vector unit computes it
alone       exp, sigmoid, gelu, norms, softmax, sums: libraries round them differently, and a sum has an order

Compiled code may still differ from eager's: a product and a sum become one instruction that rounds once, or a sum with
zeros is left out, which changes the sign of a zero. A probe finds that on the device (`planning/probe_regions.py`).

A region computes half precision in float32 without the roundings in between. So an operator that reads what another
one rounds to half precision stays outside, and reads it from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxzero.graph.fusion.gaps import maker
from fxzero.graph.fusion.operators import fusable, is_costly, overloads
from fxzero.graph.nodes import is_pointwise
from fxzero.graph.step import StepGraph

aten = torch.ops.aten

_ROUNDED = overloads(
    "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar "
    "div.Tensor div.Scalar reciprocal.default rsqrt.default pow.Tensor_Scalar _to_copy.default"
)
"""The one correct rounding of the exact result: of two exact operations, for `rsqrt`."""
_MOVED = overloads(
    "clone.default where.self constant_pad_nd.default cat.default stack.default slice_backward.default "
    "select_backward.default slice_scatter.default select_scatter.default masked_fill.Scalar masked_fill.Tensor "
    "tril.default triu.default flip.default repeat.default expand_copy.default fill.Scalar fill.Tensor "
    "neg.default abs.default relu.default threshold_backward.default"
)
"""What each element is, is decided without arithmetic."""
_DECIDED = overloads(
    "eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar "
    "ge.Tensor ge.Scalar logical_and.default logical_or.default logical_not.default logical_xor.default "
    "bitwise_and.Tensor bitwise_and.Scalar bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_not.default"
)
_HALVES = (torch.float16, torch.bfloat16)
_LONG = overloads("gelu.default mish.default")
"""Functions of several that take a CPU longer than writing and reading what they computed."""


def exactly_fusable(step: StepGraph) -> set[fx.Node]:
    """The nodes that may stand in regions whose numbers are eager's to the last bit."""
    inside = set[fx.Node]()
    unrounded = set[fx.Node]()
    allowed = {node for node in fusable(step) if _is_defined(node)}
    for node in step.graph.nodes:
        if node not in allowed:
            continue
        is_moved, reads_unrounded = (
            node.target in _MOVED,
            any(maker(each) in unrounded for each in node.all_input_nodes),
        )
        if reads_unrounded and not is_moved:
            continue
        inside.add(node)
        if node.meta["val"].dtype in _HALVES and (reads_unrounded or not is_moved):
            unrounded.add(node)
    return inside


def repeated_alone(step: StepGraph, inside: set[fx.Node]) -> set[fx.Node]:
    """Pointwise operators outside of regions that may run again in backward, by themselves: silu, sigmoid, exp, say."""
    outside = fusable(step) - inside
    return {node for node in outside if is_pointwise(node) and not is_costly(node) and node.target not in _LONG}


def _is_defined(node: fx.Node) -> bool:
    """True for an operator whose result has one right value for each element."""
    check = _CHECKS.get(node.target)
    return node.target in _MOVED | _DECIDED or (node.target in _ROUNDED and (check is None or check(node)))


def _adds_as_it_is(node: fx.Node) -> bool:
    """False for `x + alpha * y`, which rounds once in one place and twice in another."""
    alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
    return bool(alpha == 1)


def _is_product(node: fx.Node) -> bool:
    """True for x, x * x and (x * x) * x."""
    return node.args[1] in (1, 2, 3)


def _does_not_truncate(node: fx.Node) -> bool:
    """False for integers of floating-point numbers: those out of range are anything."""
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    is_narrowed = before.is_floating_point() and not after.is_floating_point() and after.dtype is not torch.bool
    return not is_narrowed


_CHECKS: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(overloads("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar"), _adds_as_it_is),
    aten.pow.Tensor_Scalar: _is_product,
    aten._to_copy.default: _does_not_truncate,
}
