"""Save the masks of dropout as bools: a quarter of the bytes.

before    mask = bernoulli(x, p)                    saved as it is, zeros and ones in the dtype of x
after     mask = bernoulli(x, p) | kept = mask != 0 | mask' = to(kept, dtype of x)      kept is saved
"""

from __future__ import annotations

import torch

from fxzero import torch_internals
from fxzero.graph.fusion.operators import MASKS
from fxzero.graph.nodes import META_KEY, Role, new_value
from fxzero.graph.step import StepGraph

aten = torch.ops.aten


def save_as_bools(step: StepGraph) -> None:
    """Let what reads a drawn mask read a cast of its bools."""
    for mask in step.nodes(Role.COMPUTE):
        if mask.target not in MASKS or not mask.users:
            continue
        value: torch.Tensor = mask.meta["val"]
        readers = list(mask.users)
        with step.graph.inserting_after(mask):
            kept = step.graph.call_function(aten.ne.Scalar, (mask, 0))
        with step.graph.inserting_after(kept):
            again = step.graph.call_function(aten._to_copy.default, (kept,), {"dtype": value.dtype})
        for node in (kept, again):
            node.meta = {key: mask.meta[key] for key in (META_KEY, "stack_trace") if key in mask.meta}
            new_value(node, torch_internals.fake_result(node))
        for reader in readers:
            reader.replace_input_with(mask, again)
