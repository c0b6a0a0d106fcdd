"""Gathers and reductions of a traced step, parameter by parameter, and what several ranks need together.

    rank 0   text.w  head.w                          a batch without an image
    rank 1   text.w  image.w  head.w
    merged   text.w  image.w  head.w                 what every rank gathers in each step

Buckets, prefetching and the order of collectives follow from this list alone: ranks with equal lists have equal
collectives.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from fxzero.graph.nodes import Role, members, role
from fxzero.graph.recipe import Need, Needs
from fxzero.graph.step import Phase, StepGraph


def needs_of(step: StepGraph) -> Needs:
    """The needs, in order, of a step that has one collective for each parameter and use."""
    return tuple(
        Need(phase.value, role(node).value, *members(node))
        for phase, nodes in step.phases()
        for node in nodes
        if role(node) in (Role.ALL_GATHER, Role.REDUCE_SCATTER)
    )


def missing_from(needs: Sequence[Need], others: Sequence[Need]) -> Need | None:
    """The first need that `others` does not have, or has in another order; None if there is none."""
    remaining = iter(others)
    return next((need for need in needs if need not in remaining), None)


def cannot_follow(needs: Needs, others: Needs) -> Need | None:
    """The first need of a step whose collectives cannot be made those of `others`; None if there is none.

    In a phase that gathers everything before it reduces anything, any order of its own can follow.
    """
    for phase in Phase:
        own, agreed = _in_phase(phase, [needs, others])
        all_agreed = frozenset(agreed)
        is_free = _gathers_first(agreed) == agreed
        unknown = (need for need in own if need not in all_agreed)
        missing = next(unknown, None) if is_free else missing_from(own, agreed)
        if missing is not None:
            return missing
    return None


def merge_needs(lists: Sequence[Needs]) -> Needs:
    """All needs of some lists, in the order of each of them.

    In a phase in which two lists contradict each other, all gathers come before all reductions: any rank can follow
    that, at the price of the memory that they hold.
    """
    return tuple(need for phase in Phase for need in _merge_phase(_in_phase(phase, lists)))


def _merge_phase(lists: Sequence[Sequence[Need]]) -> Iterable[Need]:
    first, *others = lists
    if all(needs == first for needs in others) and len(set(first)) == len(first):
        return first
    import networkx as nx  # takes 10 MB, which most runs do not need

    try:
        return list(_merge_in_order(lists))
    except nx.NetworkXUnfeasible:
        return _gathers_first(dict.fromkeys(need for needs in lists for need in needs))


def _gathers_first(needs: Iterable[Need]) -> list[Need]:
    return sorted(needs, key=lambda need: need.role != Role.ALL_GATHER.value)


def _in_phase(phase: Phase, lists: Sequence[Needs]) -> list[list[Need]]:
    return [[need for need in needs if need.phase == phase.value] for needs in lists]


def _merge_in_order(lists: Iterable[Sequence[Need]]) -> Iterable[Need]:
    """A topological order; of several needs that may come next, it takes the one that was seen first."""
    import networkx as nx

    order: nx.DiGraph[Any] = nx.DiGraph()
    for needs in lists:
        order.add_nodes_from(needs)
        order.add_edges_from(pairwise(needs))
    seen = {need: index for index, need in enumerate(order)}
    return nx.lexicographical_topological_sort(order, key=seen.__getitem__)
