"""What fused compute saves for backward: the minimum cut by bytes, where regions may run pointwise operators again.

    x = mm(...) | n = norm(x) | mm(n, w)    saved: x and the statistics of its rows; backward makes n again from them

Sums and maxima of rows never run again. On a CPU neither do exp, tanh and the like, which take longer than reading
what they computed.
"""

from __future__ import annotations

import operator
from typing import cast

from torch import fx

from fxzero.graph.fusion.operators import is_costly, is_free, is_reduction
from fxzero.graph.min_cut import Copies, choose_saved
from fxzero.graph.step import StepGraph


def save_less(step: StepGraph, fusable: set[fx.Node], *, repeats_costly: bool) -> None:
    """Let backward compute again what takes more bytes to save than its inputs.

    Args:
        fusable: the nodes that may stand in regions.
        repeats_costly: exp, tanh and the like may run again.
    """
    if not step.has_backward:
        return

    def is_pinned(node: fx.Node) -> bool:
        if node in fusable:
            return is_reduction(node) or (is_costly(node) and not repeats_costly)
        if node.target is operator.getitem:
            return cast(fx.Node, node.args[0]) in fusable and is_pinned(cast(fx.Node, node.args[0]))
        return not is_free(node)

    _, again = choose_saved(step, is_pinned)
    Copies(step, again).replace_inputs()
