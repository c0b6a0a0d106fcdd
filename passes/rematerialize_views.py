"""Recompute in backward whatever forward computes from parameters alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero.graph.min_cut import Copies
from fxzero.graph.nodes import Role, is_pure, role
from fxzero.graph.step import Phase, StepGraph


def computed_from_params(step: StepGraph) -> set[fx.Node]:
    """Forward compute whose tensor inputs are parameters, at least one, constants, or again such nodes."""
    derived: set[fx.Node] = set()
    phase, nodes = next(step.phases())
    assert phase is Phase.FORWARD
    for node in nodes:
        inputs = node.all_input_nodes
        from_params = any(n in derived or role(n) is Role.PARAM for n in inputs)
        nothing_else = all(n in derived or role(n) in (Role.PARAM, Role.CONSTANT) for n in inputs)
        if from_params and nothing_else and is_pure(node):
            derived.add(node)
    return derived


@dataclass(frozen=True)
class RematerializeViews:
    """Give backward its own copy of every view, cast or concatenation of parameters.

    Before:  wt = t(w) | mm(x, wt) | end_forward | mm(grad, t(wt))
    After:   wt = t(w) | mm(x, wt) | end_forward | wt' = t(w) | mm(grad, t(wt'))

    So no gathered parameter, nor a view of one, is ever saved for backward, and each phase can gather for itself.

    Needs: nothing; runs first. Numerics: unchanged, bit for bit.
    Source: DeepCompile (arXiv:2504.09983) tags parameter aliases as must-recompute for a partitioner; here the joint
    graph is rewritten directly, and random operators are never recomputed.
    """

    def __call__(self, step: StepGraph, /) -> None:
        if not step.has_backward:
            return
        Copies(step, computed_from_params(step)).replace_inputs()
