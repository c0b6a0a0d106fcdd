"""What share of a step's compute its islands are."""

from typing import Any, cast

from fxzero.cost.model import flops
from fxzero.graph.nodes import Role, is_island
from fxzero.graph.step import StepGraph


def islands_line(step: StepGraph) -> list[str]:
    """A line on the islands of a step; none where there are none."""
    compute = step.nodes(Role.COMPUTE)
    islands = [node for node in compute if is_island(node)]
    if not islands:
        return []
    names = dict.fromkeys(cast(Any, node.args[0]).fqn or "the whole model" for node in islands)
    shown = ", ".join([*names][:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    total = sum(map(flops, compute))
    share = f", {sum(map(flops, islands)) / total:.0%} of the floating-point operations" if total else ""
    return [f"islands, of which nothing inside is planned: {shown}{share}"]
