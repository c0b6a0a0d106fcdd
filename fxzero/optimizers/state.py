"""Optimizer state: cut it from full parameters into shards, and keep the state of all shards in one buffer.

torch.optim makes its state (exp_avg and so on) in the first step, tensor by tensor, wherever the allocator has room.
Right after that step it is moved into one buffer, so that it fragments nothing, and later steps allocate nothing.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxzero.errors import OptimizerError
from fxzero.graph.layout import ALIGNMENT_BYTES, Layout, ParamSpec, Slice, align
from fxzero.host.allocator import give_back_freed_memory
from fxzero.runtime.storage import storage_view


def rehome_state(optimizer: torch.optim.Optimizer, params: Collection[int], *, of_wholes: bool = False) -> int:
    """Move every state tensor of a shard's shape into one buffer, one tensor at a time.

    On the CPU each tensor is freed before the next one is moved, and the pages of the buffer are mapped as they are
    written, so that the peak is little above the state.

    Args:
        params: the ids of the Parameter objects whose state is moved.
        of_wholes: the state is that of whole parameters: tensors of any shape are moved, but for single elements.

    Returns:
        The bytes of the buffer; 0 if there was nothing to move, or two devices to move it on.
    """
    found: list[tuple[dict[str, Any], str]] = []
    for _, param in parameters_of(optimizer, params):
        state: dict[str, Any] = optimizer.state.get(param, {})
        found += [(state, key) for key, value in state.items() if _can_move(value, None if of_wholes else param.shape)]
    devices = {state[key].device for state, key in found}
    if len(devices) != 1:
        return 0
    nbytes = sum(align(state[key].nbytes, ALIGNMENT_BYTES) for state, key in found)
    device = devices.pop()
    storage = torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    offset = num_freed = 0
    with torch.no_grad():
        for state, key in found:
            value = state[key]
            home = storage_view(storage, offset, value.numel(), value.dtype, device).view(value.shape)
            home.copy_(value)
            offset += align(value.nbytes, ALIGNMENT_BYTES)
            state[key] = home
            num_freed += value.nbytes
            del value
            if num_freed >= _GIVEN_BACK_BYTES and device.type == "cpu":
                give_back_freed_memory()
                num_freed = 0
    give_back_freed_memory()
    return nbytes


_GIVEN_BACK_BYTES = 64 * 2**20
"""Freed state that may stay with the allocator, which keeps small tensors, and all of them if it was told so."""


def _can_move(value: object, shape: torch.Size | None) -> bool:
    """True for a plain tensor of a shape; a subclass (8-bit state, say) would lose its form in a buffer.

    Args:
        shape: None for any of more than one element.
    """
    if type(value) is not Tensor or not value.is_contiguous():
        return False
    return value.numel() > 1 if shape is None else value.shape == shape


_REBUILD = "Build the optimizer after fxzero.compile, from the parameters of what it returns."
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})
"""Keys of state that has one element for the whole parameter, also where the parameter itself has one element."""


@dataclass(frozen=True)
class ParamShard:
    """The part of one parameter that a rank holds: elements `part` of the flattened parameter, on `device`."""

    spec: ParamSpec
    part: Slice
    device: torch.device
    owner: int | None = None
    """The rank that steps the whole parameter and has its state, of which other ranks have nothing; None if all step
    their slices."""

    @property
    def shape(self) -> tuple[int, ...]:
        is_owned = self.owner is not None and self.part.numel == self.spec.numel
        return self.spec.shape if is_owned else self.spec.shard_shape(self.part.numel)

    @property
    def is_stepped(self) -> bool:
        """True if this rank steps it, so that state for it may be here."""
        return self.owner is None or self.part.numel == self.spec.numel


def param_shards(
    params: Mapping[str, nn.Parameter], layout: Layout, rank: int, device: torch.device
) -> dict[int, ParamShard]:
    """Maps the id of each Parameter object to this rank's part of it."""
    return {
        id(params[spec.fqn]): ParamShard(spec, bucket.slice_of(spec, rank), device)
        for bucket in layout.buckets
        for spec in bucket.params
    }


def cut_state(optimizer: torch.optim.Optimizer, shards: Mapping[int, ParamShard]) -> None:
    """Cut the state that an optimizer has for full parameters into state for this rank's shards.

    A tensor of the parameter's shape becomes a slice with storage of its own on the shard's device, so that the full
    tensor is freed. Accumulators that Adagrad made for a meta model are made anew for the shard. Scalars are kept. The
    state of parameters that are stepped whole stays on their owners, and is dropped elsewhere.

    Args:
        optimizer: one that passed `check_optimizer`; its parameters may be cut already.
        shards: as `param_shards` returns them; state of other parameters is left alone.

    Raises:
        OptimizerError: a state tensor has neither the parameter's shape nor a single element. Nothing was cut then.
    """
    drop_unowned(optimizer, shards)
    states = [
        (optimizer.state[param], group, shards[id(param)])
        for group, param in parameters_of(optimizer, shards)
        if param in optimizer.state and shards[id(param)].owner is None
    ]
    for state, _, shard in states:
        for key, value in state.items():
            if _kind(key, value, shard.spec) == "other":
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {name_of(optimizer)} is {text_of(value)}; only tensors of "
                    f"the parameter's shape {shard.spec.shape} and single elements can be cut into shards. {_REBUILD}"
                )
            if isinstance(value, Tensor) and value.is_meta and type(optimizer) is not torch.optim.Adagrad:
                raise OptimizerError(
                    f"State {key!r} of {shard.spec.fqn} in {name_of(optimizer)} is on the meta device, without values. "
                    f"{_REBUILD}"
                )
    for state, group, shard in states:
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_meta:
                state[key] = _make_for_adagrad(optimizer, group, key, value, shard)
            elif _kind(key, value, shard.spec) == "like its parameter":
                own = value.reshape(-1)[shard.part.start : shard.part.stop]
                state[key] = own.view(shard.shape).to(shard.device, copy=True)


def _kind(key: str, value: object, spec: ParamSpec) -> Literal["like its parameter", "scalar", "other"]:
    if not isinstance(value, Tensor):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return "other" if any(isinstance(item, Tensor) and item.numel() > 1 for item in items) else "scalar"
    if tuple(value.shape) == spec.shape and not (value.numel() == 1 and key in _SCALARS):
        return "like its parameter"
    return "scalar" if value.numel() == 1 else "other"


def drop_unowned(optimizer: torch.optim.Optimizer, held: Mapping[int, ParamShard]) -> None:
    """Drop the state of parameters that another rank steps."""
    for _, param in parameters_of(optimizer, held):
        if not held[id(param)].is_stepped:
            optimizer.state.pop(param, None)


def is_like(key: str, value: Tensor, spec: ParamSpec) -> bool:
    """True if a tensor in the state has an element for each element of the full parameter."""
    return _kind(key, value, replace(spec, shape=spec.whole_shape)) == "like its parameter"


def fits(key: str, value: object, shard: Tensor, spec: ParamSpec) -> bool:
    """True if a value in the state has the shape of the shard, or is a scalar for the whole parameter."""
    if isinstance(value, Tensor) and not value.is_meta and value.shape == shard.shape:
        return True
    return _kind(key, value, spec) == "scalar"


def parameters_of(optimizer: torch.optim.Optimizer, params: Collection[int]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The parameters with these ids that an optimizer steps, each behind its group."""
    for group in optimizer.param_groups:
        yield from ((group, param) for param in group["params"] if id(param) in params)


def _make_for_adagrad(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], key: str, value: Tensor, shard: ParamShard
) -> Tensor:
    """The state of a shard as Adagrad's constructor makes it, which did so on meta for a meta model."""
    if key == "step":
        return torch.zeros((), dtype=value.dtype, device=shard.device if group["fused"] else "cpu")
    initial = optimizer.defaults["initial_accumulator_value"]
    fill = complex(initial, initial) if value.is_complex() else initial
    return torch.full(shard.shape, fill, dtype=value.dtype, device=shard.device)


def name_of(optimizer: object) -> str:
    return type(optimizer).__name__


def text_of(value: object) -> str:
    is_tensor = isinstance(value, Tensor)
    return f"{value.dtype} {tuple(value.shape)}" if is_tensor else f"a {type(value).__name__} of tensors"
