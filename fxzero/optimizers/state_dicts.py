"""State dicts of optimizers of shards: this rank's slices for the user, pieces for torch.distributed.checkpoint.

who asks                                         state          groups
a user: optimizer.state_dict()                   slices         marks say whose slices they are
torch.distributed.checkpoint                     pieces         as in plain PyTorch
accelerator.save_state; whole_state_dict()       whole tensors  as in plain PyTorch

What is loaded may be slices with the mark of this rank, or pieces, other DTensors and full tensors, which are cut.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fxzero import torch_internals
from fxzero.checkpoint.callers import is_asked_by_checkpoint, is_asked_for_whole
from fxzero.checkpoint.pieces import Pieces
from fxzero.errors import CheckpointError
from fxzero.optimizers import made_up
from fxzero.optimizers.classes import state_per_element, steps_wholes
from fxzero.optimizers.marks import PREFIX, marks_of
from fxzero.optimizers.state import ParamShard, is_like, name_of, text_of
from fxzero.optimizers.whole import state as whole_state
from fxzero.optimizers.whole.owners import owned_shards

Held: TypeAlias = Mapping[int, tuple[ParamShard, Pieces]]
"""This rank's part of each parameter, by the id of the Parameter object, and what shows it."""
StateDict: TypeAlias = dict[str, Any]


class OptimizerStateDict(dict[str, Any]):
    """A state dict of this rank's slices, whose items torch.distributed.checkpoint sees as pieces.

    It is copied as such, and pickled as a plain dict in order.
    """

    def __init__(
        self, items: Mapping[str, Any] | Iterable[tuple[str, Any]], show: Callable[[StateDict], StateDict] = dict
    ) -> None:
        super().__init__(items)
        self._show = show

    def items(self) -> Any:  # type: ignore[override]
        """The items of this rank; with pieces if torch.distributed.checkpoint asks."""
        return self._show(self).items() if is_asked_by_checkpoint() else super().items()

    def shown(self) -> StateDict:
        """The state dict with pieces in the place of slices."""
        return self._show(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizerStateDict":
        return OptimizerStateDict(copy.deepcopy(dict(dict.items(self)), memo).items(), self._show)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return OrderedDict, (), None, None, iter(dict.items(self))


torch_internals.seen_as_dict(OptimizerStateDict)


def after_state_dict(optimizer: torch.optim.Optimizer, state_dict: StateDict, held: Held) -> StateDict | None:
    """What an optimizer gives away in the place of its own state dict; None for that itself.

    Raises:
        CheckpointError: torch.distributed.checkpoint asks, and there is no state yet, but gradients.
    """
    held = _held_by(optimizer, held)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    by_key = {key: held[id(param)] for key, param in enumerate(params) if id(param) in held}
    if not by_key:
        return None
    is_made_up, is_whole = made_up.is_unusable(optimizer), steps_wholes(optimizer)
    show = partial(_with_pieces, by_key=by_key, is_made_up=is_made_up, is_whole=is_whole)
    if is_asked_for_whole():
        return _whole(show(state_dict))
    if not is_asked_by_checkpoint():
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            for shards in _by_model(held).values():
                saved.update(marks_of(group, shards))
        return OptimizerStateDict(state_dict.items(), show)
    shown = show(state_dict)
    lacks_state = not shown["state"] and not made_up.is_noted(optimizer)
    if lacks_state and state_per_element([optimizer]) and _is_training(params, held):
        if any(param.grad is not None for param in params):
            raise CheckpointError(
                f"{name_of(optimizer)} has no state yet, but gradients: step, or call optimizer.zero_grad(), before "
                "its state is saved or loaded."
            )
        torch_internals.make_optimizer_state(optimizer)
        if optimizer.state or is_whole:
            return optimizer.state_dict()
    return shown


def whole_state_dict(optimizer: torch.optim.Optimizer) -> StateDict:
    """The state dict of an optimizer as plain PyTorch has it, with whole tensors; a collective.

    Every optimizer loads it, of a compiled model at any number of ranks or of the plain one.
    """
    local = optimizer.state_dict()
    return _whole(local.shown()) if isinstance(local, OptimizerStateDict) else local


def _whole(shown: StateDict) -> StateDict:
    state = {
        key: {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in shown["state"][key].items()
        }
        for key in sorted(shown["state"])  # the same order on all ranks
    }
    return {**shown, "state": state}


def _held_by(optimizer: torch.optim.Optimizer, held: Held) -> Held:
    """What this rank has of the state of each parameter: a slice, or all or nothing of a whole one."""
    if not steps_wholes(optimizer):
        return held
    owned: dict[int, tuple[ParamShard, Pieces]] = {}
    for pieces, shards in _by_model(held).items():
        of_model = owned_shards(optimizer, shards, pieces.layout, pieces.rank)
        owned.update({key: (shard, pieces) for key, shard in of_model.items()})
    return owned


def _by_model(held: Held) -> dict[Pieces, dict[int, ParamShard]]:
    found: dict[Pieces, dict[int, ParamShard]] = {}
    for key, (shard, pieces) in held.items():
        found.setdefault(pieces, {})[key] = shard
    return found


def _is_training(params: Iterable[Tensor], held: Held) -> bool:
    return any(param.requires_grad for param in params if id(param) in held)


def _with_pieces(
    local: StateDict, *, by_key: Mapping[int, tuple[ParamShard, Pieces]], is_made_up: bool, is_whole: bool
) -> StateDict:
    """A state dict with pieces in the place of slices, and without marks; of whole parameters a collective."""
    if is_whole:
        state = whole_state.show(local["state"], by_key, is_made_up=is_made_up)
    else:
        state = {
            key: _show(values, *by_key[key], is_made_up=is_made_up) if key in by_key else values
            for key, values in local["state"].items()
        }
    groups = [
        {key: value for key, value in group.items() if not key.startswith(PREFIX)} for group in local["param_groups"]
    ]
    return {**dict.copy(local), "state": state, "param_groups": groups}


def _show(values: Mapping[str, Any], shard: ParamShard, pieces: Pieces, *, is_made_up: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{key} of {shard.spec.fqn}"
        if not isinstance(value, Tensor) or hasattr(value, "whole"):  # no tensor, or a piece that was loaded
            shown[key] = value
        elif tuple(value.shape) == shard.shape:
            shown[key] = pieces.show(shard.spec, value, name, is_made_up=is_made_up)
        elif value.numel() > 1:
            raise CheckpointError(
                f"State {name} is {text_of(value)}, and the shard of the parameter here {shard.shape}: it cannot be "
                "saved as a part of a whole. Save optimizer.state_dict() of each rank in a file of its own."
            )
        else:
            shown[key] = value
    return shown


def is_whole(state_dict: StateDict) -> bool:
    """True if a state dict has the state of whole parameters."""
    if any(key.startswith(PREFIX) for group in state_dict["param_groups"] for key in group):
        return False
    return any(
        isinstance(value, Tensor) and value.dim() for state in state_dict["state"].values() for value in state.values()
    )


def before_load(optimizer: torch.optim.Optimizer, state_dict: StateDict, held: Held) -> StateDict | None:
    """Cut what is about to be loaded into this rank's slices; None if it does not fit anyway.

    Raises:
        CheckpointError: a tensor has another shape than its parameter, or a state is missing.
    """
    held = _held_by(optimizer, held)
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if len(keys) != len(params):
        return None  # which torch refuses
    is_of_slices = any(key.startswith(PREFIX) for group in groups for key in group)
    state = dict(state_dict["state"])
    if steps_wholes(optimizer):
        if state or is_of_slices:
            whole_state.note_state(optimizer)
        of_params = {key: held[id(param)][0] for key, param in zip(keys, params, strict=True) if id(param) in held}
        cut = {key: whole_state.cut(state.pop(key), shard) for key, shard in of_params.items() if key in state}
        return {**state_dict, "state": state | {key: values for key, values in cut.items() if values}}
    for key, param in zip(keys, params, strict=True):
        if id(param) in held and key in state:
            state[key] = _cut(state[key], *held[id(param)], is_of_slices=is_of_slices)
            if not state[key] and param.requires_grad and state_per_element([optimizer]) and is_asked_by_checkpoint():
                raise CheckpointError(
                    f"The state of {held[id(param)][0].spec.fqn} got lost: {name_of(optimizer)} had none when "
                    "torch.distributed.checkpoint looked. Call optimizer.zero_grad() before its state is loaded."
                )
    return {**state_dict, "state": state}


def _cut(values: Mapping[str, Any], shard: ParamShard, pieces: Pieces, *, is_of_slices: bool) -> dict[str, Any]:
    """The state of one parameter with this rank's slice of each whole tensor.

    Args:
        is_of_slices: it is that of a rank already; DTensors in it are whole tensors all the same.
    """
    cut: dict[str, Any] = {}
    for key, value in values.items():
        is_whole = isinstance(value, Tensor) and not is_of_slices and is_like(key, value, shard.spec)
        if is_whole or hasattr(value, "full_tensor"):
            own = pieces.cut(shard.spec, value, f"State {key!r} of {shard.spec.fqn}")
            cut[key] = own if hasattr(value, "whole") else own.clone()
        else:
            cut[key] = value
    return cut
