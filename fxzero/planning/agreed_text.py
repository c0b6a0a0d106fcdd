"""What ranks must have in common before they exchange a parameter, as text: one fact a line."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fxzero import torch_internals
from fxzero.graph.layout import Layout, ParamSpec
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import Pass
from fxzero.passes import default_passes


def describe_passes(recipe: Recipe, passes: Sequence[Pass] | None) -> str:
    """The passes that a plan starts from: a list of the user's, or those that the recipe stands for."""
    return ", ".join(map(repr, default_passes(recipe) if passes is None else passes))


def describe_layout(layout: Layout, options: Mapping[str, object]) -> list[str]:
    """What every rank must have in common before a parameter is exchanged, one fact a line."""
    lines = [f"world size: {layout.shard_ranks}", *describe_options(options)]
    for index, bucket in enumerate(layout.buckets):
        lines += [f"{line}, bucket {index}" for line in describe_params(bucket.params)]
    return lines


def describe_options(options: Mapping[str, object]) -> list[str]:
    """One option a line."""
    return [f"option {name}: {value}" for name, value in options.items()]


def describe_params(params: Iterable[ParamSpec]) -> list[str]:
    """One parameter a line."""
    return [
        f"parameter {param.fqn}: {param.dtype} {'x'.join(map(str, param.shape)) or 'scalar'} "
        f"{'trained' if param.requires_grad else 'frozen'}"
        for param in params
    ]


def describe_buffers(model: nn.Module) -> list[str]:
    """One buffer a line."""
    saved = {
        id(buffer)
        for module in model.modules()
        for name, buffer in torch_internals.buffers_of(module).items()
        if torch_internals.is_persistent(module, name)
    }
    return [
        f"buffer {fqn}: {buffer.dtype} {'x'.join(map(str, buffer.shape)) or 'scalar'}"
        + ", not persistent" * (id(buffer) not in saved)
        for fqn, buffer in model.named_buffers()
    ]
