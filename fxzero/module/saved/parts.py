"""What a rank has to save: its slices of parameters and of optimizer state, buffers, plain values.

model/layers.0.weight                 a parameter
buffer/norm.running_mean              a buffer, of rank 0
optim/0/exp_avg/layers.0.weight       state of the first optimizer that has an element for each of the parameter's
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.checkpoint.pieces import Exchange
from fxzero.checkpoint.values import DTYPES, encode
from fxzero.comm.groups import Group, Hierarchy, resolve_group
from fxzero.errors import CheckpointError
from fxzero.module.registered_tensors import entries
from fxzero.module.sharded_model import ShardedModel
from fxzero.optimizers.classes import steps_wholes
from fxzero.optimizers.marks import PREFIX
from fxzero.optimizers.state import ParamShard, name_of
from fxzero.optimizers.whole.state import described_by_all
from fxzero.optimizers.whole.wrapped import inside

Optimizers: TypeAlias = Sequence[torch.optim.Optimizer]
TOPIC = "checkpoint"
"""Of the agreements of ranks that save or load."""


def position(group: Group | None) -> int:
    """The number of this rank among all that have the model."""
    if isinstance(group, Hierarchy):
        return group.ranks.index(dist.get_rank())
    resolved = resolve_group(group)
    return 0 if resolved is None else resolved.rank()


def num_positions(group: Group | None) -> int:
    """The number of ranks that have the model."""
    if isinstance(group, Hierarchy):
        return len(group.ranks)
    resolved = resolve_group(group)
    return 1 if resolved is None else resolved.size()


def refuse_parts(sharded: ShardedModel) -> None:
    """Refuse a model of which ranks have parameters of their own: parts of tensor parallelism, or ignored ones.

    Raises:
        CheckpointError: it is one.
    """
    if sharded.parallel:
        raise CheckpointError(
            f"{next(iter(sharded.parallel))} is cut by tensor parallelism, of which the checkpoints of fxzero.save "
            "know nothing. Save and load with torch.distributed.checkpoint: dcp.save(get_model_state_dict(zero), ...)."
        )
    refuse_ignored(sharded, "fxzero.save and fxzero.load", "dcp.save(get_model_state_dict(zero), ...)")


def refuse_ignored(sharded: ShardedModel, what: str, instead: str) -> None:
    """Refuse a model with ignored parameters.

    Args:
        what: what cannot take them.
        instead: what can.

    Raises:
        CheckpointError: it has some.
    """
    if sharded.ignored:
        raise CheckpointError(
            f"{next(iter(sharded.ignored))} is one of ignored_params, of which each rank may have values of its own: "
            f"{what} cannot tell which are wanted. Use {instead}, which has those of this rank."
        )


def buffers(sharded: ShardedModel) -> dict[str, Tensor]:
    """The buffers that a state dict has, by canonical name."""
    found: dict[str, Tensor] = {}
    for entry in entries(sharded.model):
        slot = entry.slots[0]
        if not entry.is_param and torch_internals.is_persistent(slot.module, slot.name):
            found[entry.fqn] = entry.tensor.detach()
    return found


def further_names(sharded: ShardedModel) -> dict[str, str]:
    """Maps each further name of a tied parameter to the first."""
    return {slot.fqn: entry.fqn for entry in entries(sharded.model) for slot in entry.slots[1:]}


def extra_states(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that define `get_extra_state`, by path."""
    named = model.named_modules()
    return {path: each for path, each in named if type(each).get_extra_state is not nn.Module.get_extra_state}


class OptimizerState:
    """The state of one optimizer in parts: slices, and what is one for the whole parameter.

    Raises:
        CheckpointError: it steps parameters of another model, or has state that is neither.
    """

    def __init__(self, number: int, optimizer: torch.optim.Optimizer, shards: dict[int, ParamShard]) -> None:
        self.number, self.optimizer, self.shards = number, optimizer, shards
        self.groups = [[self._shard(param) for param in group["params"]] for group in optimizer.param_groups]
        """This rank's part of each parameter, by group."""
        self.slices: dict[str, tuple[ParamShard, Tensor]] = {}
        """The slices of tensors like a parameter, by the tensor's name in a checkpoint."""
        self.values: dict[str, dict[str, Any]] = {}
        """All state by parameter and key: None for a slice, a value as JSON, or a dict of such for what is inside of a
        tensor of a class of its own."""
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        """The dtype and shape of each tensor of which there are slices, on any rank, by its name in a checkpoint."""
        for param, state in optimizer.state.items():
            self._add(self._shard(param), state)

    def complete(self, exchange: Exchange) -> None:
        """Learn from other ranks what state they have of whole parameters; a collective."""
        if not steps_wholes(self.optimizer):
            return
        held = {id(param): param for group in self.optimizer.param_groups for param in group["params"]}
        own = {self.shards[key].spec.fqn: self.optimizer.state.get(param, {}) for key, param in held.items()}
        self.values.clear()
        for fqn, described in described_by_all(exchange, own).items():
            self.values[fqn] = {key: self._complete(key, fact, fqn) for key, fact in described.items()}

    def _complete(self, key: str, fact: Mapping[str, Any], fqn: str) -> Any:
        """What `values` has for a state that `describe` tells of; notes its tensors."""
        if "value" in fact:
            return [fact["value"]]
        if "inside" in fact:
            return {name: self._complete(f"{key}.{name}", each, fqn) for name, each in fact["inside"].items()}
        self.tensors[self.tensor(key, fqn)] = DTYPES[fact["dtype"]], tuple(fact["shape"])
        return None

    def _shard(self, param: Any) -> ParamShard:
        if id(param) not in self.shards:
            raise CheckpointError(
                f"{name_of(self.optimizer)} steps a parameter {tuple(param.shape)} that is not of this model. Save "
                "models that share an optimizer with torch.distributed.checkpoint."
            )
        return self.shards[id(param)]

    def _add(self, shard: ParamShard, state: dict[str, Any]) -> None:
        values = self.values.setdefault(shard.spec.fqn, {})
        for key, value in state.items():
            name, is_tensor = f"state {key!r} of {shard.spec.fqn}", isinstance(value, Tensor)
            if shard.owner is not None and (parts := inside(value)):
                self._add(shard, {f"{key}.{part}": each for part, each in parts.items()})
            elif is_tensor and (tuple(value.shape) == shard.shape or (shard.owner is not None and value.numel() > 1)):
                tensor = self.tensor(key, shard.spec.fqn)
                self.slices[tensor] = shard, value
                self.tensors[tensor] = value.dtype, shard.spec.shape if shard.owner is None else tuple(value.shape)
                values[key] = None
            elif is_tensor and value.numel() > 1:
                raise CheckpointError(
                    f"{name} of {name_of(self.optimizer)} is {tuple(value.shape)}, and the shard here {shard.shape}: "
                    "it is no part of a whole."
                )
            else:
                values[key] = [encode(value, name)]

    def tensor(self, key: str, fqn: str) -> str:
        """The name of a state tensor in a checkpoint."""
        return f"optim/{self.number}/{key}/{fqn}"

    def described(self) -> dict[str, Any]:
        """All of it but the slices, as JSON."""
        options = [
            {key: encode(value, f"option {key!r} of {name_of(self.optimizer)}") for key, value in group.items()
             if key != "params" and not key.startswith(PREFIX)}
            for group in self.optimizer.param_groups
        ]  # fmt: skip
        params = [[shard.spec.fqn for shard in group] for group in self.groups]
        return {"class": name_of(self.optimizer), "options": options, "params": params, "state": self.values}


# -- random states -------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all generators that this rank draws from by default."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def tensors_of(
    sharded: ShardedModel, states: Sequence[OptimizerState]
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """The name, dtype and shape of each tensor of a checkpoint."""
    for fqn, param in sharded.params.items():
        yield f"model/{fqn}", param.dtype, sharded.specs[fqn].shape
    for fqn, buffer in buffers(sharded).items():
        yield f"buffer/{fqn}", buffer.dtype, tuple(buffer.shape)
    for state in states:
        yield from ((name, *facts) for name, facts in state.tensors.items())
