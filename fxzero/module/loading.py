"""Hooks of modules for the end of a load, which look at what was loaded and at what was missing."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fxzero import torch_internals
from fxzero.module.methods.gathered import fqns_of, gathered
from fxzero.module.registered_tensors import join
from fxzero.module.sharded_model import ShardedModel


def has_hooks_after_load(model: nn.Module) -> bool:
    """True if a part of the model has a hook of `register_load_state_dict_post_hook`."""
    return any(torch_internals.hooks_after_load(module) for module in model.modules())


def run_hooks_after_load(sharded: ShardedModel, keys: Any) -> None:
    """Run the hooks that modules have for the end of a load, each on whole parameters of its module; a collective.

    Args:
        keys: the missing and the unexpected names, which hooks may change.
    """
    for path, module in _children_first("", sharded.model):
        for hook in torch_internals.hooks_after_load(module):
            if sharded.shards is None or not sharded.has_shards_in(module):
                hook(module, keys)
                continue
            with gathered(sharded, fqns_of(sharded, module), f"a hook of load_state_dict of {path or 'the model'}"):
                hook(module, keys)


def _children_first(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        yield from _children_first(join(path, name), child)
    yield path, module
