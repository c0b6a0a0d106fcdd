"""What fused compute saves for backward: a minimum cut, where regions may run pointwise operators again.

    x = mm(...) | n = norm(x) | y = mm(n, w)

fewest bytes     x and the statistics of its rows are saved; backward makes n again from them, for the product that
                 is w's gradient
least time       n is saved too: that product reads it from memory anyway. log, pow and the like, which take longer than
                 writing and reading what they computed, never run again. What is written for backward alone, as all
                 its readers are in the region that makes it, costs twice its bytes

Sums and maxima of rows never run again.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from typing import cast

from torch import fx

from fxzero.graph.fusion.gaps import anchors, find_gaps, maker, readers
from fxzero.graph.fusion.operators import is_costly, is_free, is_reduction
from fxzero.graph.min_cut import Copies, choose_saved
from fxzero.graph.nodes import tensor_bytes
from fxzero.graph.step import Phase, StepGraph


def save_less(step: StepGraph, fusable: set[fx.Node], alone: Set[fx.Node] = frozenset(), *, fewest_bytes: bool) -> None:
    """Let backward compute again what costs more to save than its inputs.

    Args:
        fusable: the nodes that may stand in regions.
        alone: other operators that may run again.
        fewest_bytes: the cost is bytes, as on a GPU, where pointwise operators run while memory is waited for; else
            it is the time of a CPU.
    """
    if not step.has_backward:
        return
    phase_of = step.phase_of()

    def takes_long(node: fx.Node) -> bool:
        is_read_by_anchor = any(phase_of.get(each) is Phase.BACKWARD and each not in fusable for each in readers(node))
        return is_costly(node) or is_read_by_anchor

    def is_pinned(node: fx.Node) -> bool:
        if node in fusable:
            return is_reduction(node) or (not fewest_bytes and takes_long(node))
        if node.target is operator.getitem:
            return cast(fx.Node, node.args[0]) in fusable and is_pinned(cast(fx.Node, node.args[0]))
        return not (is_free(node) or node in alone)

    gap = find_gaps(step, fusable, anchors(step, fusable))

    def is_in_memory(node: fx.Node) -> bool:
        """True for what forward writes to memory even if it is not saved."""
        here = gap.get(maker(node))
        return here is None or any(
            phase_of.get(each) is Phase.FORWARD and gap.get(each) != here for each in readers(node)
        )

    def cost(node: fx.Node) -> int:
        return tensor_bytes(node.meta.get("val")) * (1 if fewest_bytes or is_in_memory(node) else 2)

    _, again = choose_saved(step, is_pinned, cost)
    Copies(step, again).replace_inputs()
