"""What a region of fused compute allocates while it runs, beside its results: known from its operators, on any machine.

    var, mean = var_mean(x) | rstd = rsqrt(var + eps) | n = (x - mean) * rstd       returned: n

`var` and `mean` are memory that the region asks for and gives back: a loop over elements reads what another loop over
rows has added up. So are copies of several tensors into one, and what is scattered into. What one loop computes and
reads itself is never in memory.
"""

import operator

import torch

from fxzero.graph.fusion.operators import REDUCTIONS, is_reduction
from fxzero.graph.nodes import tensor_bytes
from fxzero.graph.regions import Region

_LEAST_ITEMSIZE = 4
"""Sums of half precision are kept in float32."""


def inside_bytes(region: Region) -> int:
    """The bytes that a region allocates inside, at most."""
    given_away = {region.results[index] for index in region.returned}
    total = 0
    for node in region.body.nodes:
        if not (is_reduction(node) or node.target is torch.ops.aten.scatter.value):
            continue
        taken = [user for user in node.users if user.target is operator.getitem]
        for value in [each.meta["val"] for each in taken or [node] if each not in given_away]:
            widened = max(_LEAST_ITEMSIZE // value.itemsize, 1) if node.target in REDUCTIONS else 1
            total += tensor_bytes(value) * widened
    return total
