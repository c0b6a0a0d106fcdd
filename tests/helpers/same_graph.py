"""A captured step as text, to compare two graphs node by node."""

from typing import Any

import torch
from torch.fx.node import map_arg

from fxzero.capture import Captured
from fxzero.graph.nodes import info


def described(captured: Captured) -> list[str]:
    """Each node with its operator, arguments, geometry, labels and source line; constants by their values."""
    step, lines = captured.step, list[str]()
    names: dict[Any, str] = {}
    for index, node in enumerate(step.graph.nodes):
        names[node] = f"%{index}"
        target: Any = repr(step.constants[node.target]) if node.op == "get_attr" else node.target
        target = "" if node.op == "placeholder" else str(target)
        arguments = map_arg((node.args, node.kwargs), names.__getitem__)
        value = _geometry(node.meta.get("val"))
        lines.append(f"{node.op} {target} {arguments} {value} {info(node)} {node.meta.get('stack_trace')}")
    return lines


def _geometry(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return [_geometry(each) for each in value] if isinstance(value, (list, tuple)) else repr(value)
