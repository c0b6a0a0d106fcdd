"""Recompute in backward whatever forward computes from parameters alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxzero.ir import NodeInfo, Phase, Role, StepGraph, info, is_pure, role


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
        derived = computed_from_params(step)
        copies: dict[fx.Node, fx.Node] = {}
        *_, (_, backward) = step.phases()
        for node in backward:
            for source in node.all_input_nodes:
                if source in derived:
                    with step.graph.inserting_before(node):
                        node.replace_input_with(source, self._copy(step, source, copies))
        for source in reversed([n for n in step.graph.nodes if n in derived and not n.users]):
            step.graph.erase_node(source)

    def _copy(self, step: StepGraph, source: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
        """Copy `source` and what it is computed from to the current insertion point; each node once."""
        if role(source) in (Role.PARAM, Role.CONSTANT):
            return source
        if source not in copies:
            for before in source.all_input_nodes:
                self._copy(step, before, copies)
            copy = step.graph.node_copy(source, lambda n: copies.get(n, n))
            copy.meta = {**source.meta, "fxzero": NodeInfo(Role.COMPUTE, info(source).fqn)}
            copies[source] = copy
        return copies[source]
