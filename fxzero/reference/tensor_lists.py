"""Collectives of lists of tensors, as they were before `*_into_tensor`: the backend flattens them again inside.

The reference to measure flat collectives against. torch's gloo and NCCL gather a list into a flat tensor of their own
and copy it out; gloo copies what it reduces too, and reduces by all-reduces: twice the bytes of a reduce-scatter.

Sums are the backend's. On two gloo ranks they are those of `GlooComm`, bit for bit; on more, their order is gloo's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from fxzero.comm.base import Bound, Comm, LocalComm
from fxzero.comm.gloo import GlooComm
from fxzero.comm.group import GroupComm
from fxzero.comm.nccl import NcclComm
from fxzero.comm.without_ranks import PlanningComm
from fxzero.errors import CommunicationError
from fxzero.graph.layout import Bucket


class _TensorLists(GroupComm):
    """What replaces the bound collectives of a backend; all else is the backend's own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._under_way: list[list[dist.Work]] = []
        """Of each collective that was started in this phase: what is still waited for."""

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        return accumulate * bucket.shard_numel

    def bind_gather(self, bucket: Bucket, shard: Tensor, full: Tensor) -> Bound:
        outputs = [list(full.split(bucket.shard_numel))]
        return self._bind(self.what("all-gather", bucket), lambda: self.group.allgather(outputs, [shard]), None)

    def bind_reduce(
        self, bucket: Bucket, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        if accumulate and (scratch is None or scratch.numel() < bucket.shard_numel):
            raise ValueError(f"scratch must have at least {bucket.shard_numel} elements to reduce {bucket.fqns[0]}")
        average = scratch[: bucket.shard_numel] if accumulate and scratch is not None else shard
        inputs, options = [list(full.split(bucket.shard_numel))], dist.ReduceScatterOptions()
        options.reduceOp = dist.ReduceOp(self._reduce_op)

        def finish() -> None:
            self._finish(average)
            if accumulate:
                shard.add_(average)

        launch = lambda: self.group.reduce_scatter([average], inputs, options)  # noqa: E731
        return self._bind(self.what("reduce-scatter", bucket), launch, finish)

    _reduce_op = dist.ReduceOp.AVG

    def _finish(self, reduced: Tensor) -> None:
        """Make the average of what the backend reduced."""

    def _bind(self, what: str, launch: Callable[[], dist.Work], finish: Callable[[], object] | None) -> Bound:
        works: list[dist.Work] = []

        def start() -> None:
            self._under_way.append(works)
            try:
                works.append(launch())
            except RuntimeError as error:
                raise self.lost(what, error) from error

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise self.lost(what, error) from error
            finally:
                works.clear()
            if finish is not None:
                finish()

        return Bound(start, wait)

    def drain(self) -> None:
        super().drain()
        self._under_way.clear()

    def abandon(self) -> None:
        for works in self._under_way:
            for work in works:
                with contextlib.suppress(RuntimeError):
                    work.wait()
            works.clear()
        super().abandon()
        with contextlib.suppress(CommunicationError):
            self.drain()


class ListGlooComm(_TensorLists, GlooComm):
    """CPU tensors over gloo, two ranks or more."""

    _reduce_op = dist.ReduceOp.SUM  # as GlooComm: a sum, then one division

    def _finish(self, reduced: Tensor) -> None:
        reduced.div_(self.world_size)


class ListNcclComm(_TensorLists, NcclComm):
    """CUDA tensors over NCCL, two ranks or more."""


class ListPlanningComm(PlanningComm):
    """A rank of a cluster that is not there, and its numbers."""

    def reduce_scratch_numel(self, bucket: Bucket, *, accumulate: bool = True) -> int:
        return accumulate * bucket.shard_numel if self.world_size > 1 else 0


def with_tensor_lists(comm: Comm) -> Comm:
    """The same ranks with collectives of lists of tensors; a rank that is alone has none.

    Raises:
        ValueError: for what is not one group of gloo or NCCL ranks.
    """
    if type(comm) is LocalComm:
        return comm
    if type(comm) is PlanningComm:
        return ListPlanningComm(comm.rank, comm.world_size, comm.device)
    if type(comm) is GlooComm:
        return ListGlooComm(comm.group)
    if type(comm) is NcclComm:
        return ListNcclComm(comm.group)
    raise ValueError(f"There are no collectives of lists of tensors for a {type(comm).__name__}.")
