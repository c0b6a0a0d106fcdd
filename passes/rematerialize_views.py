"""Recompute in backward the values that forward computes from parameters alone."""

from dataclasses import dataclass

from torch import fx

from fxzero.graph.min_cut import Copies
from fxzero.graph.nodes import Role, is_pure, role
from fxzero.graph.step import StepGraph


def computed_from_params(step: StepGraph) -> set[fx.Node]:
    """Forward compute nodes that depend on at least one parameter, and on nothing but parameters and constants.

    Parameters that forward writes are left out: in backward they have other values.
    """
    written = {step.param_nodes()[fqn] for fqn in step.written}
    derived: set[fx.Node] = set()
    _, nodes = next(step.phases())
    for node in nodes:
        others = [role(source) for source in node.all_input_nodes if source not in derived]
        from_params = Role.PARAM in others or len(others) < len(node.all_input_nodes)
        is_fixed = {*others} <= {Role.PARAM, Role.CONSTANT} and written.isdisjoint(node.all_input_nodes)
        if from_params and is_fixed and is_pure(node):
            derived.add(node)
    return derived


@dataclass(frozen=True)
class RematerializeViews:
    """Give backward its own copy of every view, cast or concatenation of parameters.

    Before:  wt = t(w) | mm(x, wt) | end_forward | mm(grad, t(wt))
    After:   wt = t(w) | mm(x, wt) | end_forward | wt' = t(w) | mm(grad, t(wt'))

    Then no gathered parameter, nor a view of one, is saved for backward, and each phase can gather for itself.

    Needs: nothing; runs first. Numerics: unchanged, bit for bit.
    Source: DeepCompile (arXiv:2504.09983) tags parameter aliases as must-recompute for a partitioner; here the joint
    graph is rewritten directly, and random operators are never recomputed.
    """

    def __call__(self, step: StepGraph, /) -> None:
        if step.has_backward:
            Copies(step, computed_from_params(step)).replace_inputs()
