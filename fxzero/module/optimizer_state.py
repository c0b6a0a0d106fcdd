"""The state of an optimizer: that for full parameters is cut for their shards, that of shards lies in one buffer.

torch.optim makes its state (exp_avg and so on) in the first step, tensor by tensor, wherever the allocator has room.
Moved together right after it, it fragments nothing, and the allocator is asked for nothing from there on.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxzero.errors import OptimizerError
from fxzero.graph.layout import ALIGNMENT_BYTES, ParamSpec, Slice, align
from fxzero.runtime.shards import Shards
from fxzero.runtime.storage import storage_view


def rehome_state(optimizer: torch.optim.Optimizer, params: Collection[int]) -> int:
    """Put every state tensor of a shard's shape into one buffer, one tensor at a time.

    On the CPU a tensor's memory is given back before the next is moved, and the buffer's pages come with its use, so
    the excess is one tensor.

    Args:
        params: the ids of the Parameter objects whose state is meant.

    Returns:
        The bytes of the buffer; 0 if there was nothing to move, or two devices to move it on.
    """
    found: list[tuple[dict[str, Any], str]] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in params:
                state: dict[str, Any] = optimizer.state.get(param, {})
                found += [(state, key) for key, value in state.items() if _is_like(value, param)]
    devices = {state[key].device for state, key in found}
    if len(devices) != 1:
        return 0
    nbytes = sum(align(state[key].nbytes, ALIGNMENT_BYTES) for state, key in found)
    device = devices.pop()
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    offset = 0
    with torch.no_grad():
        for state, key in found:
            value = state[key]
            home = storage_view(storage, offset, value.numel(), value.dtype, device)
            home.copy_(value)
            offset += align(value.nbytes, ALIGNMENT_BYTES)
            state[key] = home
            del value
    return nbytes


def _is_like(value: object, shard: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == shard.shape and value.is_contiguous()


REBUILD = "Build the optimizer after fxzero.compile, from the parameters of what it returns."


_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})
"""State of one element for the whole parameter, whatever the parameter's shape."""


@dataclass(frozen=True)
class ParamShard:
    """What a rank holds of one parameter: the elements `part` of its `spec.numel`, flattened, on `device`."""

    spec: ParamSpec
    part: Slice
    device: torch.device


def param_shards(params: Mapping[str, nn.Parameter], shards: Shards) -> dict[int, ParamShard]:
    """What this rank holds of each parameter, by the id of the Parameter object."""
    return {
        id(params[spec.fqn]): ParamShard(spec, bucket.slice_of(spec, shards.rank), shards.device)
        for bucket in shards.layout.buckets
        for spec in bucket.params
    }


def cut_state(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
    """Cut the state that an optimizer has for full parameters like the parameters themselves.

    A tensor of the parameter's shape becomes a 1-D slice with storage of its own, on the shard's device, so that the
    full one is freed; the accumulators that Adagrad makes for a meta model are made for the shard. Scalars are kept.

    Args:
        optimizer: one that passed `check_optimizer`; it does not matter whether its parameters are cut already.
        shards: what this rank holds of each parameter, by the id of the Parameter object; others are left alone.

    Raises:
        OptimizerError: a state tensor has neither the parameter's shape nor a single element. Nothing was cut then.
    """
    states = [
        (optimizer.state[param], group, shards[id(param)])
        for group, param in parameters_of(optimizer, shards)
        if param in optimizer.state
    ]
    for state, _, shard in states:
        for key, value in state.items():
            if _kind(key, value, shard.spec) is _Kind.OTHER:
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {name_of(optimizer)} is {text_of(value)}; only tensors of "
                    f"the parameter's shape {shard.spec.shape} and single elements can be cut into shards. {REBUILD}"
                )
            if isinstance(value, Tensor) and value.is_meta and type(optimizer) is not torch.optim.Adagrad:
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {name_of(optimizer)} is on the meta device, without values. "
                    f"{REBUILD}"
                )
    for state, group, shard in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_meta:
                state[key] = _make_for_adagrad(optimizer, group, key, value, shard)
            elif _kind(key, value, shard.spec) is _Kind.LIKE_PARAM:
                state[key] = value.reshape(-1)[shard.part.start : shard.part.stop].to(shard.device, copy=True)


class _Kind(enum.Enum):
    """What one value in an optimizer's state is to its parameter."""

    LIKE_PARAM = "like_param"
    SCALAR = "scalar"
    OTHER = "other"


def _kind(key: str, value: object, spec: ParamSpec) -> _Kind:
    if not isinstance(value, Tensor):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return _Kind.OTHER if any(isinstance(item, Tensor) and item.numel() > 1 for item in items) else _Kind.SCALAR
    if value.numel() == 1 and key in _SCALARS:
        return _Kind.SCALAR
    if tuple(value.shape) == spec.shape:
        return _Kind.LIKE_PARAM
    return _Kind.SCALAR if value.numel() == 1 else _Kind.OTHER


def fits(key: str, value: object, shard: Tensor, spec: ParamSpec) -> bool:
    """Whether a value in the state is one for the shard: of its shape, or one for the whole parameter."""
    if isinstance(value, Tensor) and not value.is_meta and value.shape == shard.shape:
        return True
    return _kind(key, value, spec) is _Kind.SCALAR


def parameters_of(
    optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The parameters of the compiled model that an optimizer steps, each with its group."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) in shards:
                yield group, param


def _make_for_adagrad(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], key: str, value: Tensor, shard: ParamShard
) -> Tensor:
    """What Adagrad's constructor makes, which it does before any step: on meta for a meta model."""
    if key == "step":
        return torch.zeros((), dtype=value.dtype, device=shard.device if group["fused"] else "cpu")
    initial = optimizer.defaults["initial_accumulator_value"]
    fill = complex(initial, initial) if value.is_complex() else initial
    return torch.full((shard.part.numel,), fill, dtype=value.dtype, device=shard.device)


def name_of(optimizer: object) -> str:
    return type(optimizer).__name__


def text_of(value: object) -> str:
    return (
        f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__} of tensors"
    )
