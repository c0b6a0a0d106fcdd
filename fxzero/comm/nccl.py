"""Collectives on NCCL: one call each, straight between the persistent buffers.

Whatever stream is current at a start is what the collective's inputs are ready on; whatever stream is current at a wait
waits for exactly that collective. `streams.py` decides which streams those are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.backend import NativeBackend
from fxzero.comm.base import Bound, in_turn
from fxzero.comm.group import GroupComm, is_half
from fxzero.graph.layout import Payload

NCCL = NativeBackend()


class NcclComm(GroupComm):
    """CUDA tensors over NCCL, two ranks or more. The order of sums is NCCL's.

    Args:
        divisor: by which sums of gradients are divided; those of float16 are divided before they are added. Default:
            NCCL averages.
    """

    backend = NCCL
    is_capturable = True

    def __init__(self, group: dist.ProcessGroup, *, divisor: float | None = None) -> None:
        super().__init__(group)
        self.chosen_divisor = divisor
        """None: NCCL averages."""
        if divisor is not None:
            self.divisor = divisor

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        gather = partial(torch_internals.all_gather_base(self.group), full, shard)
        return self.bind_work(gather, self.what("all-gather", payload))

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        average = shard if room is None else room
        before, behind = quotient(payload, self.chosen_divisor, full, average)
        options = reduce_options(self.chosen_divisor)
        reduce = partial(torch_internals.reduce_scatter_base(self.group), average, full, options)
        start, wait = self.bind_work(reduce, self.what("reduce-scatter", payload)).stage
        return Bound(in_turn(before, start), wait).then(behind, partial(shard.add_, average) if accumulate else None)

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


def reduce_op(divisor: float | None) -> dist.ReduceOp:
    """What NCCL does: it averages, or adds up what is divided by a chosen divisor elsewhere."""
    return dist.ReduceOp(dist.ReduceOp.AVG if divisor is None else dist.ReduceOp.SUM)


def reduce_options(divisor: float | None) -> dist.ReduceScatterOptions:
    """Options of a reduce-scatter that does so."""
    options = dist.ReduceScatterOptions()
    options.reduceOp = reduce_op(divisor)
    return options


Quotient: TypeAlias = tuple[Callable[[], object] | None, Callable[[], object] | None]
"""What divides gradients before they are added, and behind."""


def quotient(payload: Payload, divisor: float | None, full: Tensor, total: Tensor) -> Quotient:
    """The division by a chosen divisor: before gradients are added, where they are halves; else behind.

    Args:
        full: the unsharded gradients of this rank.
        total: this rank's slice of their sum.
    """
    if divisor is None or divisor == 1:
        return None, None
    if is_half(payload):
        return partial(full.div_, divisor), None
    return None, partial(total.div_, divisor)
