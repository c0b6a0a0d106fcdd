"""Replace in-place operators of a traced graph by functional ones, and write their results back at the end.

Before:  add_(buf, 1) | mul(buf, x)            After:  y = add(buf, 1) | mul(y, x) | copy_(buf, y)
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.graph import ops
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, is_in_place
from fxzero.torch_internals import tree_leaves

_KEPT_META = (META_KEY, "stack_trace")


def functionalize(root: fx.GraphModule) -> fx.GraphModule:
    """An equal graph whose only in-place operator is `copy_` onto placeholders; it keeps labels and boundary."""
    if not any(is_in_place(node) for node in root.graph.nodes):
        return root
    placeholders = root.graph.find_nodes(op="placeholder")
    values = [node.meta["val"] for node in placeholders]
    inputs: list[Any] = [value.detach() if isinstance(value, Tensor) else value for value in values]
    replay = _Replay(root)
    with torch.no_grad(), inputs[0].fake_mode if inputs else torch_internals.fake_tensor_mode():
        traced = torch_internals.trace_fx(torch.func.functionalize(replay.run, remove="mutations"), *inputs)
    for old, new in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        _copy_meta(old, new)
    return traced


class _Replay(fx.Interpreter):
    """Runs a graph node by node inside another trace, and gives the nodes it makes the labels of their origin."""

    def __init__(self, root: fx.GraphModule) -> None:
        super().__init__(root, garbage_collect_values=False)

    def run_node(self, n: fx.Node) -> Any:
        made = torch_internals.traced_graph()
        if n.target is ops.end_forward:
            # A value that forward wrote must be computed in forward, also if only backward reads it.
            for value in tree_leaves(list(self.env.values())):
                if isinstance(value, Tensor):
                    torch_internals.apply_pending_updates(value)
            self._label(made, None)
            made.call_function(ops.end_forward).meta[META_KEY] = NodeInfo(Role.END_FORWARD)
            return None
        result = super().run_node(n)
        self._label(made, n)
        return result

    @staticmethod
    def _label(made: fx.Graph, origin: fx.Node | None) -> None:
        for node in reversed(made.nodes):
            if META_KEY in node.meta or node.op == "placeholder":
                break
            if node.op == "get_attr":
                node.meta[META_KEY] = NodeInfo(Role.CONSTANT)
            elif origin is not None:
                _copy_meta(origin, node)
            if META_KEY not in node.meta or origin is None:
                node.meta[META_KEY] = NodeInfo(Role.COMPUTE)


def _copy_meta(origin: fx.Node, node: fx.Node) -> None:
    node.meta.update({key: origin.meta[key] for key in _KEPT_META if key in origin.meta})
