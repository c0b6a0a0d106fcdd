"""The pieces of one layout: shows this rank's slices to torch.distributed.checkpoint, and cuts what comes back."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fxzero.comm.base import Comm
from fxzero.comm.groups import Group, Hierarchy
from fxzero.comm.tensor_parallel import whole_of
from fxzero.errors import CheckpointError
from fxzero.graph.layout import Layout, ParamSpec

if TYPE_CHECKING:
    from fxzero.checkpoint.piece import Whole


Exchange: TypeAlias = Callable[[Callable[[], list[str]]], list[list[str]]]
"""Returns the lines of all ranks, given what makes those of this one; a collective. Others are told if that fails."""


class Pieces:
    """Shows tensors of this rank as pieces of whole ones, and cuts whole ones.

    Args:
        group: the ranks of the model; None for the default group, or one rank.
        gathering: a phase of all ranks, in which a piece is gathered.
        exchange: returns the lines of all ranks, given what makes those of this one; a collective.
    """

    def __init__(
        self,
        layout: Layout,
        comm: Comm,
        group: Group | None,
        device: torch.device,
        gathering: Callable[[], Any],
        exchange: Exchange,
    ) -> None:
        self.layout, self.comm, self._group, self._device = layout, comm, group, device
        self._gathering, self.exchange = gathering, exchange
        self._mesh: DeviceMesh | None = None

    def show(self, spec: ParamSpec, own: Tensor, name: str = "", *, is_made_up: bool = False) -> Tensor:
        """This rank's slice of a parameter, or of a tensor like it, as a piece that shares its memory.

        On one rank the whole tensor; of a scalar a copy, which all ranks get: a collective then.
        """
        if self.comm.is_alone and not spec.is_cut:
            return own.detach().view(spec.shape)
        from fxzero.checkpoint.piece import Piece, Whole  # torch.distributed.tensor takes long to import

        whole = Whole(
            name or spec.fqn,
            spec.whole_shape,
            self.ranges(spec),
            self.comm.rank,
            self.mesh,
            self._gather,
            is_made_up,
            spec.shape,
            spec.parallel,
        )
        flat = own.detach().view(-1)
        return Piece.of(flat, whole) if spec.shape else self._gather(flat, whole)

    @property
    def rank(self) -> int:
        """The number of this rank's shard."""
        return self.comm.rank

    def show_owned(
        self, name: str, shape: tuple[int, ...], own: Tensor, owner: int, *, is_made_up: bool = False
    ) -> Tensor:
        """A tensor that one rank has whole, as pieces of which that of its owner is everything.

        Args:
            own: the tensor on its owner, which shares memory with the piece; one without elements elsewhere.
        """
        from fxzero.checkpoint.piece import Piece, Whole  # torch.distributed.tensor takes long to import

        numel = math.prod(shape)
        ranges = tuple((0, numel * (rank == owner)) for rank in range(self.comm.shard_ranks))
        whole = Whole(name, shape, ranges, self.comm.rank, self.mesh, self._gather, is_made_up)
        return Piece.of(own.detach().view(-1), whole)

    def ranges(self, spec: ParamSpec) -> tuple[tuple[int, int], ...]:
        """Start and stop of each rank's slice of a parameter."""
        bucket = self.layout.bucket_of[spec.fqn]
        parts = [bucket.slice_of(spec, rank) for rank in range(bucket.shard_ranks)]
        return tuple((part.start, part.stop) for part in parts)

    def cut(self, spec: ParamSpec, value: Tensor, name: str) -> Tensor:
        """This rank's slice of what a state dict has: a piece, another DTensor, or a full tensor.

        Gathers a DTensor that is not a piece of the same range: a collective then.

        Raises:
            CheckpointError: it has another shape than the parameter.
        """
        if tuple(value.shape) != spec.whole_shape:
            found = tuple(value.shape)
            raise CheckpointError(
                f"{name} is {found} in the state dict and {spec.whole_shape} in the model. Load a full one."
            )
        start, stop = self.ranges(spec)[self.comm.rank]
        shape = spec.shard_shape(stop - start)
        whole = getattr(value, "whole", None)
        offsets = None if spec.parallel is None else (spec.shape, spec.parallel.offsets)
        if whole is not None and whole.place == (spec.whole_shape, self.ranges(spec), offsets):
            return cast(Any, value).flat.view(shape)
        return spec.local_of(full_tensor(value).detach()).reshape(-1)[start:stop].view(shape)

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks that share the tensors."""
        if self._mesh is None:
            kind, group = self._device.type, self._group
            if isinstance(group, Hierarchy) and group.shards_across:
                # other ranks, of another row of tensor parallelism say, may make a group of their own, or none
                sharing = dist.new_group(list(group.ranks), use_local_synchronization=True)
            else:
                sharing = group.inside if isinstance(group, Hierarchy) else group or dist.group.WORLD
            assert isinstance(sharing, dist.ProcessGroup)
            self._mesh = DeviceMesh.from_group(sharing, kind)
        return self._mesh

    def _gather(self, flat: Tensor, whole: "Whole") -> Tensor:
        longest = max(stop - start for start, stop in whole.ranges)
        sent = flat.new_zeros(longest, device=self._device)
        sent[: flat.numel()].copy_(flat)
        received = sent.new_empty(len(whole.ranges) * longest)
        with self._gathering():
            self.comm.gather_to_all(sent, received)
        parts = received.view(len(whole.ranges), longest)
        cut = [part[: stop - start] for part, (start, stop) in zip(parts, whole.ranges, strict=True)]
        local = torch.cat(cut).view(whole.shape if whole.local_shape is None else whole.local_shape)
        return whole_of(whole.parallel, local)


def full_tensor(value: Any) -> Tensor:
    """The whole of a DTensor, which is a collective; another tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
