"""Copies of a compiled model: each rank's slices are those of the original, so that both can be averaged by shards.

layout of the original        what a copy gets
fixed                         the same layout, and shards of its own with equal values
not fixed                     whole parameters; as soon as the layout of one is fixed, so is that of the others
"""

import copy
from typing import Any

import torch

from fxzero import torch_internals
from fxzero.errors import FxzeroError
from fxzero.module.ownership import give_back, refuse_copy
from fxzero.module.parts import copying_parts
from fxzero.module.sharded_model import ShardedModel
from fxzero.runtime.shards import Shards


def begin_copy(sharded: ShardedModel) -> None:
    """Return once all ranks are about to copy the model.

    Raises:
        FxzeroError: it has no values yet, or an optimizer is in the middle of its step.
        RankMismatchError: a rank does something else.
    """
    if sharded.has_meta_params():
        raise FxzeroError(
            f"{type(sharded.model).__name__} is on the meta device, without values to copy. Call the compiled module, "
            "or load a state dict into it, before copy.deepcopy (or AveragedModel)."
        )
    if sharded.is_stepping or sharded.comm.phases.is_inside:
        raise FxzeroError("copy.deepcopy of a compiled module in the middle of a step. Copy it before or after.")
    with sharded.phases.phase("copying"):
        sharded.comm.meet()


def copy_model(sharded: ShardedModel, memo: dict[int, Any]) -> tuple[torch.nn.Module, Shards | None]:
    """A copy of the model as it was given to compile; its parameters are views of shards of its own, if there are some.

    Args:
        memo: as `copy.deepcopy` has it.
    """
    shards = None if sharded.shards is None else _copy_shards(sharded, memo)
    attributes = sharded.model.__dict__
    refusal = attributes.pop("__reduce_ex__")
    try:
        with copying_parts(sharded), torch_internals.without_hooks_of_state_dicts(sharded.model):
            copied = copy.deepcopy(sharded.model, memo)
    finally:
        attributes["__reduce_ex__"] = refusal
    copied.__dict__["__reduce_ex__"] = refuse_copy
    give_back(copied)
    for module in copied.modules():
        for hooks in torch_internals.forward_hooks_of(module):
            for cast in sharded.casts:
                hooks.pop(cast.id, None)
    return copied, shards


def _copy_shards(sharded: ShardedModel, memo: dict[int, Any]) -> Shards:
    """Shards with the values of all parameters; `memo` gets the Parameter objects of the copy."""
    own = sharded.shards
    assert own is not None
    with torch.inference_mode(False), torch.no_grad():
        shards = Shards(own.layout, own.rank, own.device)
        for fqn, param in sharded.params.items():
            view = shards.param_view(fqn)
            view.copy_(param.data)
            memo[id(param)] = type(param)(view, requires_grad=param.requires_grad)
    return shards


def lay_out_alike(sharded: ShardedModel, copied: ShardedModel, shards: Shards | None) -> None:
    """Give a copy the layout of its original, now or as soon as one of them has it."""
    if shards is None:
        sharded.family.append(copied)
        copied.family = sharded.family
        return
    copied.recipe = sharded.recipe
    copied.phases.is_fixed()
    copied.hold(shards)
