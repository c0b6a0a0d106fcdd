"""A value for every placeholder of a captured step: the model's and the example's own where this rank has them.

Other tensors get made-up values: a parameter of which this rank holds a part, anything on the meta device, every
tangent. They are equal in every run and keep activations finite.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxzero.capture.call import name_of_ignored
from fxzero.graph.nodes import Role, info, role, tensor_bytes
from fxzero.graph.step import StepGraph


def example_values(step: StepGraph, model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """A tensor, or a number, for each placeholder, by the name of its node.

    Args:
        step: a captured step, before or after any passes.
        model: the model whose call was captured.
        inputs: the tensors of the call, in the order of `flatten_call`; behind them the step has ignored parameters.
    """
    generator = torch.Generator().manual_seed(0)
    paths = (info(node).fqn for node in step.nodes(Role.INPUT))
    real: dict[tuple[Role, str], Any] = {
        **{(Role.PARAM, fqn): param.detach() for fqn, param in model.named_parameters()},
        **{(Role.BUFFER, fqn): buffer for fqn, buffer in model.named_buffers()},
        **{(Role.INPUT, path): tensor for path, tensor in zip(paths, inputs, strict=False)},
        **{(Role.INPUT, name_of_ignored(fqn)): param.detach() for fqn, param in model.named_parameters()},
    }
    values: dict[str, Any] = {}
    for node in step.graph.find_nodes(op="placeholder"):
        like = node.meta["val"]
        value = real.get((role(node), info(node).fqn))
        if not isinstance(like, Tensor):  # a number of the Python state
            values[node.name] = like
            continue
        if value is None or value.is_meta or value.numel() != like.numel():
            value = _made_up(node, generator)
        if role(node) is Role.PARAM:
            value = value.reshape(like.shape)  # a shard that holds the whole parameter is flat
        values[node.name] = value.to(like.device) if like.device.type != "meta" else value
    return values


def _made_up(node: fx.Node, generator: torch.Generator) -> Tensor:
    """A CPU tensor of the geometry of a placeholder: bools alternate, integers are 0, floats have magnitudes around 1.

    Parameters are scaled by the length of a row, so that sums over a row have magnitudes around 1 too. Inputs and
    buffers are positive, because one of them may be a variance.
    """
    like: Tensor = node.meta["val"]
    span = tensor_bytes(like) // like.dtype.itemsize
    if like.dtype is torch.bool:
        flat = torch.arange(span) % 2 == 0
    elif like.is_complex():
        flat = torch.randn(span, dtype=like.dtype, generator=generator)
    elif not like.is_floating_point():
        flat = torch.zeros(span, dtype=like.dtype)
    elif role(node) in (Role.INPUT, Role.STATE, Role.BUFFER):
        flat = (torch.rand(span, generator=generator) + 0.5).to(like.dtype)
    else:
        row_numel = math.prod(like.shape[1:]) if role(node) is Role.PARAM else 1
        flat = (torch.randn(span, generator=generator) / math.sqrt(max(row_numel, 1))).to(like.dtype)
    return flat.as_strided(like.shape, like.stride())
