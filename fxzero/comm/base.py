"""Collectives, bound once to their persistent buffers, so that a generated step calls functions without arguments.

    bound = comm.bind_gather(bucket, shard, full)        # at compile time
    bound.start(); ...; bound.wait()                     # in every step; a part that has nothing to do is None

Buffers are flat: `full` [bucket.numel] is `world_size` slices [bucket.shard_numel] in rank order, `shard` is one such
slice. Starts come in one order, the same on all ranks. A shard must not change before `drain()`, which ends each phase.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fxzero import torch_internals
from fxzero.errors import CommunicationError, PlanError
from fxzero.graph.layout import Bucket
from fxzero.graph.stages import Group, Hierarchy

REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


class Bound(NamedTuple):
    """A collective and its buffers. None: there is nothing to do."""

    start: Callable[[], object] | None
    wait: Callable[[], object] | None

    def then(self, *work: Callable[[], object] | None) -> Bound:
        """The same, whose wait is followed by work, if there is some."""
        return Bound(self.start, in_turn(self.wait, *work)) if any(work) else self


def in_turn(*functions: Callable[[], object] | None) -> Callable[[], object]:
    """One function that calls those that are there, in order."""
    calls = [function for function in functions if function is not None]

    def all_of_them() -> None:
        for call in calls:
            call()

    return all_of_them


class Comm(ABC):
    """What the ranks of one process group exchange. All operations but the bound ones block (on CUDA: the stream)."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.num_nodes = 1
        """Of a 2-D mesh: groups of `world_size` ranks that hold the same, and average gradients over all
        (`hierarchy.py`), or parts of one such group (`hierarchy_shard.py`)."""
        self.shards_across = False
        """True if nodes are parts of one group."""

    @property
    def is_alone(self) -> bool:
        """True if there is nobody to talk to."""
        return self.world_size * self.num_nodes == 1

    @property
    def is_rank0(self) -> bool:
        """True on the rank whose values count."""
        return self.rank == 0

    @property
    def gathers_in_place(self) -> bool:
        """True if the shard already is the whole bucket, so that gathers need no memory."""
        return self.world_size == 1

    @abstractmethod
    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        """Elements of scratch that a reduce-scatter needs between its start and its wait; 0 if none.

        Overwriting needs no more than accumulating.
        """

    @property
    def sums_locally(self) -> bool:
        """True if reduce-scatters are an exchange and sums of our own, which may be wider than what travels."""
        return False

    @abstractmethod
    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        """Gather `shard` [shard_numel] of every rank into `full` [numel]. At world size 1 both are the same memory.

        If `shard` is this rank's slice of `full`, which need not persist, it is sent by the end of the wait.
        """

    def bind_gather_keeping(self, bucket: Bucket, shard: Tensor, full: Tensor, secondary: Tensor) -> Bound:
        """The same, and leave this rank's slice of what travels inside its node in `secondary`, which persists.

        Only where `shards_across`.

        Args:
            secondary: `[num_nodes * shard_numel]`. If `shard` is this rank's part of it, that is sent by the end of the
                wait.
        """
        raise NotImplementedError(f"{type(self).__name__} gathers in one stage")

    def bind_gather_inside(self, bucket: Bucket, secondary: Tensor, full: Tensor) -> Bound:
        """Gather from the secondary shards of this node alone, which `bind_gather_keeping` left."""
        raise NotImplementedError(f"{type(self).__name__} gathers in one stage")

    @abstractmethod
    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        """Average `full` [numel] over the ranks; this rank's slice goes to `shard` [shard_numel].

        Args:
            full: the unsharded gradients; their contents are undefined after the wait.
            scratch: at least `reduce_scratch_numel(bucket, accumulate=accumulate)` elements; may be None if that is 0.
            accumulate: add the average to `shard` at the wait; else overwrite it, from the start on.
        """

    def bind_exchange(self, bucket: Bucket, sent: Tensor, received: Sequence[Tensor]) -> Bound:
        """Send the r-th slice of `sent` [numel] to rank r and receive from it `received[r]` [shard_numel].

        The rank's own entry of `received` is left alone. Only where `sums_locally`.
        """
        raise NotImplementedError(f"{type(self).__name__} reduces by its backend")

    @abstractmethod
    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Reduce a small tensor over the ranks, in place. No host synchronisation on CUDA."""

    @abstractmethod
    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        """Fill `shard` [shard_numel] with this rank's slice of the `full` [numel] of rank 0 (None elsewhere)."""

    @abstractmethod
    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        """Overwrite a tensor of any shape, dtype and strides with that of rank 0."""

    @abstractmethod
    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        """Gather `shard` [shard_numel] of every rank into `full` [numel]."""

    @abstractmethod
    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        """Gather `shard` [shard_numel] of every rank into the `full` [numel] of rank 0 (None elsewhere)."""

    def drain(self) -> None:
        """End a phase: everything this rank has to send is out, so its shards may change."""
        return

    def abandon(self) -> None:
        """End a phase in the middle, after an error: take in what peers have sent, so that none takes it for the next.

        Peers that failed in the same place can then go on together.
        """
        return


class LocalComm(Comm):
    """One rank: the shard is the whole bucket."""

    def __init__(self) -> None:
        super().__init__(0, 1)

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        return 0

    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        return Bound(None, _copy(full, shard))

    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        return Bound(None, partial(shard.add_, full) if accumulate else _copy(shard, full))

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        pass

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        assert full is not None
        shard.copy_(full)

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        pass

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        full.copy_(shard)

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        assert full is not None
        full.copy_(shard)


def _copy(into: Tensor, source: Tensor) -> Callable[[], object] | None:
    """The copy between two buffers; None if they are the same memory."""
    return None if into.data_ptr() == source.data_ptr() else partial(into.copy_, source)


class PlanningComm(Comm):
    """A rank of a cluster that is not there: its numbers can be asked for, nothing can be bound or moved.

    Args:
        rank, world_size: inside a node.
        device: whose numbers: "cpu" stands for gloo, "cuda" for NCCL.
    """

    def __init__(self, rank: int, world_size: int, device: str | torch.device = "cpu", *, num_nodes: int = 1) -> None:
        super().__init__(rank, world_size)
        self.num_nodes = num_nodes
        self.device = torch.device(device)

    @property
    def sums_locally(self) -> bool:
        return self.num_nodes == 1 and self.device.type == "cpu"

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        if self.world_size == 1:
            receives = accumulate and self.device.type == "cpu" and not self.is_alone
            return bucket.shard_numel if receives else 0
        if self.device.type == "cpu":
            return (self.world_size - 2 + accumulate) * bucket.shard_numel
        return accumulate * bucket.shard_numel

    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        self._refuse()

    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        self._refuse()

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self._refuse()

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        self._refuse()

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        self._refuse()

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        self._refuse()

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PlanError(
            f"This is rank {self.rank} of {self.world_size} of a process group that is not there. "
            "Such a plan can be shown, not run; to run it, start that many ranks with torchrun."
        )


class GroupComm(Comm):
    """What gloo and NCCL share: the operations outside of the step, which block."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self.group = group
        self.called = f"Rank {self.rank} of {self.world_size}"
        """This rank in error texts."""

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        try:
            self.group.allreduce([tensor], REDUCE_OPS[op]).wait()
        except RuntimeError as error:
            raise self.lost(f"an all-reduce of {tensor.numel()} elements", error) from error

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        slices = None if full is None else list(as_bytes(full).chunk(self.world_size))
        with self._named(f"a scatter of {shard.nbytes} bytes per rank"):
            dist.scatter(as_bytes(shard), slices, group=self.group, group_src=0)

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            return
        flat = tensor.detach().contiguous()
        with self._named(f"a broadcast of {flat.nbytes} bytes"):
            dist.broadcast(as_bytes(flat), group=self.group, group_src=0)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(flat)

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        with self._named(f"an all-gather of {full.nbytes} bytes"):
            torch_internals.all_gather_base(self.group)(as_bytes(full), as_bytes(shard)).wait()

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        slices = None if full is None else list(as_bytes(full).chunk(self.world_size))
        with self._named(f"a gather of {shard.nbytes} bytes per rank"):
            dist.gather(as_bytes(shard), slices, group=self.group, group_dst=0)

    def what(self, word: str, bucket: Bucket) -> str:
        """A bound collective in error texts."""
        first, last = bucket.fqns[0], bucket.fqns[-1]
        names = first if first == last else f"{first} .. {last}"
        return f"the {word} of bucket {names} ({bucket.nbytes / 2**20:.2f} MiB)"

    def lost(self, what: str, error: Exception) -> CommunicationError:
        """The error to raise where waiting for a peer ended in `error`."""
        return CommunicationError(
            f"{self.called} did not complete {what}: {str(error).strip().splitlines()[0]}\n"
            "A peer has ended, or did not come within the process group's timeout: the first error among the other "
            "ranks says why. No rank can go on with this process group; restart from a checkpoint."
        )

    @contextlib.contextmanager
    def _named(self, what: str) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self.lost(what, error) from error


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 [nbytes], which every backend can move; `tensor` is contiguous."""
    return tensor.detach().view(-1).view(torch.uint8)


def resolve_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The given group, else the default one; None if torch.distributed is not in use."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def make_comm(group: Group | None, device: torch.device) -> Comm:
    """The Comm for process groups (None: the default group, if there is one) and the device of its buffers.

    Raises:
        ValueError: the group has no backend for this device that fxzero knows.
    """
    from fxzero.comm.gloo import GlooComm
    from fxzero.comm.nccl import NcclComm
    from fxzero.comm.nodes_replicate import make_hierarchical_comm
    from fxzero.comm.nodes_share import make_sharded_comm

    if isinstance(group, Hierarchy):
        return (make_sharded_comm if group.shards_across else make_hierarchical_comm)(group, device)
    group = resolve_group(group)
    if group is None:
        return LocalComm()
    backend = torch_internals.backend_name(group, device)
    if backend == "fake":
        return PlanningComm(group.rank(), group.size(), device)
    if group.size() == 1:
        return LocalComm()
    if backend == "gloo" and device.type == "cpu":
        return GlooComm(group)
    if backend == "nccl" and device.type == "cuda":
        return NcclComm(group)
    raise unknown_backend(backend, device)


def unknown_backend(backend: str, device: torch.device) -> ValueError:
    """The error for a process group that fxzero cannot use on a device."""
    return ValueError(
        f"fxzero communicates by gloo on cpu and by nccl on cuda; this process group has {backend!r} for "
        f'{device.type}. Call torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
    )
