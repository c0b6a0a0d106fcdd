"""State of whole parameters in state dicts: its owner has all of it, and other ranks learn what there is.

a user: optimizer.state_dict()      what this rank owns
torch.distributed.checkpoint        all on every rank: pieces, of which the owner's is everything, and plain values

So names and shapes are those of the unsharded optimizer, and each rank can own other parameters after a load.
"""

import json
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fxzero.checkpoint.pieces import Exchange, Pieces, full_tensor
from fxzero.checkpoint.values import DTYPES, decode, encode, name_of_dtype
from fxzero.errors import CheckpointError
from fxzero.optimizers.state import ParamShard
from fxzero.optimizers.whole.owners import Ranges
from fxzero.optimizers.whole.wrapped import inside

State = dict[str, Any]
"""The state of one parameter."""

_with_state: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def note_state(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer has taken a step, or was given state: it has some, though none on a rank that owns nothing."""
    _with_state.add(optimizer)


def has_state(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer has state, on this rank or another one."""
    return bool(optimizer.state) or optimizer in _with_state


def describe(state: State, fqn: str) -> dict[str, Any]:
    """The state of one parameter as JSON: dtype and shape of a tensor of several elements, other values as they are.

    A tensor of a class of its own is described by those inside.

    Raises:
        CheckpointError: a value is neither a plain tensor nor one that JSON can hold.
    """
    described: dict[str, Any] = {}
    for key, value in state.items():
        name = f"state {key!r} of {fqn}"
        if parts := inside(value):
            described[key] = {"inside": describe(parts, fqn)}
        elif isinstance(value, Tensor) and value.numel() > 1:
            if type(value) is not Tensor or name_of_dtype(value.dtype) not in DTYPES:
                raise CheckpointError(
                    f"{name} is a {type(value).__name__}, which cannot be saved. Save "
                    "optimizer.state_dict() of each rank in a file of its own."
                )
            described[key] = {"dtype": name_of_dtype(value.dtype), "shape": list(value.shape)}
        else:
            described[key] = {"value": encode(value, name)}
    return described


def described_by_all(exchange: Exchange, own: Mapping[str, State]) -> dict[str, dict[str, Any]]:
    """What `describe` says of the state of each parameter, by name, as its owner has it; a collective."""

    def lines() -> list[str]:
        return [json.dumps({fqn: describe(state, fqn) for fqn, state in own.items() if state})]

    merged: dict[str, dict[str, Any]] = {}
    for (post,) in exchange(lines):
        merged.update(json.loads(post))
    return merged


def show(
    state: Mapping[int, State], by_key: Mapping[int, tuple[ParamShard, Pieces]], *, is_made_up: bool
) -> dict[int, State]:
    """The state of all parameters as torch.distributed.checkpoint sees it on each rank; a collective.

    Args:
        state: what this rank owns.
        by_key: the parameters of compiled models, by their numbers in the state dict.
    """
    shown = {key: values for key, values in state.items() if key not in by_key}
    for pieces in dict.fromkeys(pieces for _, pieces in by_key.values()):
        members = {key: shard for key, (shard, of) in by_key.items() if of is pieces}
        own = {shard.spec.fqn: state.get(key, {}) for key, shard in members.items() if shard.is_stepped}
        described = described_by_all(pieces.exchange, own)
        for key, shard in members.items():
            if (facts := described.get(shard.spec.fqn)) is not None:
                values = state.get(key, {}) if shard.is_stepped else {}
                shown[key] = _show_one(facts, values, shard, pieces, is_made_up=is_made_up)
    return shown


def _show_one(facts: Mapping[str, Any], own: State, shard: ParamShard, pieces: Pieces, *, is_made_up: bool) -> State:
    shown: State = {}
    for name, fact in facts.items():
        if "inside" in fact:
            raise CheckpointError(
                f"state {name!r} of {shard.spec.fqn} is a tensor of a class of its own, which cannot be saved as part "
                "of a whole. Use fxzero.save, or save optimizer.state_dict() of each rank in a file of its own."
            )
        if "value" in fact:
            shown[name] = own[name] if name in own else decode(fact["value"])
        elif pieces.comm.is_alone:
            shown[name] = own[name]
        else:
            assert shard.owner is not None
            value = own.get(name)
            if value is None:
                value = torch.empty(0, dtype=DTYPES[fact["dtype"]], device=shard.device)
            whole = f"{name} of {shard.spec.fqn}"
            shown[name] = value if hasattr(value, "whole") else pieces.show_owned(
                whole, tuple(fact["shape"]), value, shard.owner, is_made_up=is_made_up
            )  # fmt: skip
    return shown


def cut(values: State, shard: ParamShard) -> State:
    """What this rank keeps of the loaded state of a parameter: on its owner all, elsewhere nothing.

    DTensors that are not pieces of the owner's are gathered: a collective then.
    """
    kept: State = {}
    for key, value in values.items():
        whole = getattr(value, "whole", None)
        if whole is not None and shard.owner == _only_holder(whole.ranges):
            kept[key] = value.flat.view(whole.shape) if shard.is_stepped else value
        else:
            kept[key] = full_tensor(value)
    return kept if shard.is_stepped else {}


def _only_holder(ranges: Ranges) -> int | None:
    """The one rank that has elements; None if several have."""
    holders = [rank for rank, (start, stop) in enumerate(ranges) if start < stop]
    return holders[0] if len(holders) == 1 else None
