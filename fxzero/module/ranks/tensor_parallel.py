"""Parameters of torch's `parallelize_module`, which are DTensors: their local tensors become the model's parameters.

The ranks that shard have equal local tensors, each other rank of tensor parallelism another one. So all that follows
compile has local tensors; a trace has DTensors around them, for the model's own hooks and operators.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fxzero import torch_internals
from fxzero.capture.dtensors import is_dtensor, local_tensor
from fxzero.comm.groups import Group, Hierarchy
from fxzero.errors import InputMismatchError
from fxzero.graph.tensor_parallel import TensorParallel, offsets_of_chunk
from fxzero.module.registered_tensors import entries


@dataclass
class LocalParameters:
    """The parameters of a model that were DTensors, by name, and how the model had them before."""

    of: dict[str, TensorParallel] = field(default_factory=dict[str, TensorParallel])
    _undo: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])

    def take(self, model: nn.Module, group: Group | None, optimizers: Sequence[Optimizer]) -> None:
        """Let the local tensor of each DTensor be the parameter, in optimizers too, after checks.

        Raises:
            InputMismatchError: a DTensor is cut in a way that is not known here, or over ranks that shard.
        """
        found = {fqn: param for fqn, param in model.named_parameters() if is_dtensor(param)}
        _check_buffers(model)
        if found:
            _check_not_sharded(model, next(iter(found)))
        self.of = {fqn: _described(fqn, param, group) for fqn, param in found.items()}
        _check_one_mesh(self.of)
        local: dict[Tensor, nn.Parameter] = {param: _local(param) for param in found.values()}
        for entry in entries(model):
            if (made := local.get(entry.tensor)) is not None:
                self._undo.append(partial(entry.put, entry.tensor))
                entry.put(made)
        for optimizer in optimizers:
            self._replace(optimizer, local)
        for param in local:
            vars(param)[torch_internals.REPLACED] = True
            self._undo.append(partial(vars(param).pop, torch_internals.REPLACED))

    def _replace(self, optimizer: Optimizer, local: Mapping[Tensor, nn.Parameter]) -> None:
        for group in optimizer.param_groups:
            before = group["params"]
            group["params"] = [local.get(param, param) for param in before]
            self._undo.append(partial(group.__setitem__, "params", before))
        state = optimizer.state
        for param in [param for param in state if param in local]:
            values = state.pop(param)
            state[local[param]] = {key: local_tensor(value) for key, value in values.items()}
            self._undo.append(partial(state.pop, local[param]))
            self._undo.append(partial(state.__setitem__, param, values))

    @contextmanager
    def given_back_on_failure(self) -> Generator[None]:
        """Undo `take` if the block fails."""
        try:
            yield
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Undo `take`."""
        for undo in self._undo:
            undo()
        self.keep()

    def keep(self) -> None:
        """Forget what was before."""
        self._undo.clear()


def _check_not_sharded(model: nn.Module, fqn: str) -> None:
    from torch.distributed.fsdp import FSDPModule  # takes long to import

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise InputMismatchError(
            f"{fqn} is a DTensor. Only plain tensors can be sharded, and FSDP2 shards this model already: compile one "
            "that fully_shard has not seen."
        )


def _described(fqn: str, param: Any, group: Group | None) -> TensorParallel:
    from torch.distributed.tensor import Replicate, Shard  # takes long to import

    mesh, placements = param.device_mesh, param.placements
    if torch_internals.gradient_hooks([param]):
        raise InputMismatchError(
            f"{fqn} is a DTensor with a hook. Register it after fxzero.compile, which replaces it."
        )
    if param.is_meta:
        raise InputMismatchError(
            f"{fqn} is a DTensor on the meta device. Give the model values before fxzero.compile: model.to_empty(...), "
            "then load or initialise it."
        )
    if mesh.ndim != 1:
        raise InputMismatchError(
            f"{fqn} is a DTensor of a mesh of {mesh.ndim} dimensions. Tensor parallelism beside fxzero has one: "
            'parallelize_module(model, mesh["tp"], plan).'
        )
    (placement,) = placements
    if type(placement) not in (Shard, Replicate):
        raise InputMismatchError(f"{fqn} is a DTensor placed as {placement}; it must be Shard(dim) or Replicate().")
    if mesh.get_coordinate() is None:
        raise InputMismatchError(f"{fqn} is a DTensor of a mesh that this rank is no member of.")
    both = sorted({*mesh.mesh.flatten().tolist()} & {*_ranks(group)} - {dist.get_rank()})
    if both:
        raise InputMismatchError(
            f"{fqn} is a DTensor, of which rank {both[0]} has another part, and that rank is among those to shard "
            'over. Pass the other dimension of the mesh: fxzero.compile(model, mesh=mesh["dp"]).'
        )
    shape, rank = tuple(param.shape), mesh.get_local_rank()
    offsets = (0,) * len(shape)
    if isinstance(placement, Shard):
        offsets = offsets_of_chunk(shape, placement.dim % len(shape), rank, mesh.size())
        placement = Shard(placement.dim % len(shape))
    return TensorParallel(mesh, placement, shape, offsets)


def _ranks(group: Group | None) -> Sequence[int]:
    if isinstance(group, Hierarchy):
        return group.ranks
    return [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)


def _check_one_mesh(found: dict[str, TensorParallel]) -> None:
    meshes = {tuple(each.mesh.mesh.flatten().tolist()): fqn for fqn, each in found.items()}
    if len(meshes) > 1:
        (ranks, fqn), (others, other), *_ = meshes.items()
        raise InputMismatchError(
            f"{fqn} is a DTensor over ranks {list(ranks)}, and {other} one over ranks {list(others)}. All DTensors of "
            "a model must be over the same ranks."
        )


def _check_buffers(model: nn.Module) -> None:
    for fqn, buffer in model.named_buffers():
        if is_dtensor(buffer):
            raise InputMismatchError(
                f"Buffer {fqn} is a DTensor. Buffers stay as they are on each rank: register its local tensor instead."
            )


def _local(param: Any) -> nn.Parameter:
    made = nn.Parameter(torch_internals.local_of(param).detach().contiguous(), requires_grad=param.requires_grad)
    vars(made).update(vars(param))
    return made
