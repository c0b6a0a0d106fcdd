"""Collectives on NCCL: one call each, straight between the persistent buffers.

Whatever stream is current at a start is what the collective's inputs are ready on; whatever stream is current at a wait
waits for exactly that collective. `streams.py` decides which streams those are.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.backend import NativeBackend
from fxzero.comm.base import Bound
from fxzero.comm.group import GroupComm
from fxzero.graph.layout import Payload

NCCL = NativeBackend()


class NcclComm(GroupComm):
    """CUDA tensors over NCCL, two ranks or more. The order of sums is NCCL's."""

    backend = NCCL

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        gather = partial(torch_internals.all_gather_base(self.group), full, shard)
        return self.bind_work(gather, self.what("all-gather", payload))

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        average = shard if room is None else room
        reduce = partial(torch_internals.reduce_scatter_base(self.group), average, full, averaging())
        bound = self.bind_work(reduce, self.what("reduce-scatter", payload))
        return bound.then(partial(shard.add_, average) if accumulate else None)

    def all_to_all(self, what: str, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        none = sent[self.rank][:0]
        into, out = list(received), list(sent)
        into[self.rank] = out[self.rank] = none
        with self._named(what):
            self.group.alltoall(into, out).wait()

    def bind_work(self, begin: Callable[[], dist.Work], what: str, *, orders_at_start: bool = False) -> Bound:
        """A call of the backend, and the wait for what it returned.

        Args:
            what: the collective, in errors.
            orders_at_start: what follows the start on the stream that is current there comes after the collective.
        """
        lost = self.lost
        work: dist.Work | None = None

        def start() -> None:
            nonlocal work
            try:
                work = begin()
                if orders_at_start:
                    work.wait()  # the stream waits, the host goes on
            except RuntimeError as error:
                raise lost(what, error) from error

        def wait() -> None:
            nonlocal work
            assert work is not None, "wait without start"
            try:
                work.wait()
            except RuntimeError as error:
                raise lost(what, error) from error
            work = None

        return Bound(start, wait)


def averaging() -> dist.ReduceScatterOptions:
    """NCCL divides by the number of ranks itself."""
    options = dist.ReduceScatterOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
    return options
