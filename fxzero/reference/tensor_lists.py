"""Collectives of lists of tensors, as they were before `*_into_tensor`: the backend flattens them again inside.

The reference to measure flat collectives against. torch's gloo and NCCL gather a list into a flat tensor of their own
and copy it out; gloo copies what it reduces too, and reduces by all-reduces: twice the bytes of a reduce-scatter.

Sums are the backend's. On two gloo ranks they are those of `GlooComm`, bit for bit; on more, their order is gloo's.
"""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor

from fxzero.comm.backend import NativeBackend
from fxzero.comm.base import Bound, Comm, LocalComm, in_turn
from fxzero.comm.gloo import GlooComm
from fxzero.comm.group import GroupComm
from fxzero.comm.nccl import NcclComm, Quotient, quotient, reduce_op
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.layout import Payload


class _TensorLists(GroupComm):
    """What replaces the bound collectives of a backend; all else is the backend's own."""

    backend = NativeBackend()

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        outputs = [list(full.split(payload.slice_numel))]
        return self._bind(self.what("all-gather", payload), lambda: self.group.allgather(outputs, [shard]), None)

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        average = shard if room is None else room
        inputs, options = [list(full.split(payload.slice_numel))], dist.ReduceScatterOptions()
        before, behind = self._quotient(payload, full, average)
        options.reduceOp = self._reduce_op()

        def finish() -> None:
            if behind is not None:
                behind()
            if accumulate:
                shard.add_(average)

        launch = lambda: self.group.reduce_scatter([average], inputs, options)  # noqa: E731
        start, wait = self._bind(self.what("reduce-scatter", payload), launch, finish).stage
        return Bound(in_turn(before, start), wait)

    def _reduce_op(self) -> dist.ReduceOp:
        """What the backend does."""
        return dist.ReduceOp(dist.ReduceOp.SUM)

    def _quotient(self, payload: Payload, full: Tensor, reduced: Tensor) -> Quotient:
        """What divides gradients before and behind that: as in GlooComm one division of a sum."""
        return None, partial(reduced.div_, self.divisor)

    def _bind(self, what: str, launch: Callable[[], dist.Work], finish: Callable[[], object] | None) -> Bound:
        works: list[dist.Work] = []

        def start() -> None:
            self._in_flight.append((works, what))
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


class ListGlooComm(_TensorLists, GlooComm):
    """CPU tensors over gloo, two ranks or more."""


class ListNcclComm(_TensorLists, NcclComm):
    """CUDA tensors over NCCL, two ranks or more."""

    def _reduce_op(self) -> dist.ReduceOp:
        return reduce_op(self.chosen_divisor)

    def _quotient(self, payload: Payload, full: Tensor, reduced: Tensor) -> Quotient:
        return quotient(payload, self.chosen_divisor, full, reduced)


def with_tensor_lists(comm: Comm) -> Comm:
    """The same ranks with collectives of lists of tensors; a rank that is alone has none.

    Raises:
        ValueError: for what is not one group of gloo or NCCL ranks.
    """
    if type(comm) is LocalComm:
        return comm
    if type(comm) is PlanningComm:
        return PlanningComm(comm.rank, comm.sharding, NativeBackend())
    if type(comm) is GlooComm:
        return ListGlooComm(comm.group, divisor=comm.divisor)
    if type(comm) is NcclComm:
        return ListNcclComm(comm.group, divisor=comm.chosen_divisor)
    raise ValueError(f"There are no collectives of lists of tensors for a {type(comm).__name__}.")
