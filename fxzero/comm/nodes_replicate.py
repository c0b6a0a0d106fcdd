"""Collectives of a 2-D mesh: gathers and reduce-scatters inside a node, then one all-reduce of the shard across nodes.

A gradient is the sum over the ranks of a node, in rank order, then over the nodes, in their order, divided once by the
number of all ranks, or by what was chosen in its place: ((g00 + g01) + (g10 + g11)) / 4. Ranks with the same shard get
the same bits, so that replicas never part.

The second stage needs the result of the first, and gloo tells that a message is there only to those who wait for it.
So a reduction is carried on where it most likely need not wait: at the start of each later reduction by one stage, and
at the latest at its own wait, which carries on the next one before it blocks:

    start b2 | start b1: b2 across | start b0: b1 across | wait b2: b0 across | wait b1 | wait b0

Source: MiCS (arXiv:2205.00119), 2-hop gradient synchronization, here of every backward; HSDP of PyTorch's FSDP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fxzero.comm.base import Bound, Comm, LocalComm, Stage, in_turn
from fxzero.comm.gloo import GLOO, GlooComm, message_tag
from fxzero.comm.group import GroupComm, is_half
from fxzero.comm.nccl import NCCL, NcclComm, quotient, reduce_op
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Axis, Placement, Sharding


class HierarchicalComm(Comm):
    """The ranks of all nodes, which hold replicas: `rank` is the one inside the node.

    Values of rank 0 are those of rank 0 of node 0, on all nodes.

    Args:
        divisor: by which sums of gradients are divided. Default: the number of all ranks.
    """

    def __init__(
        self, inside: Comm, across: GroupComm, placement: Placement = "replicate", *, divisor: float | None = None
    ) -> None:
        super().__init__(inside.rank, Sharding(Axis(inside.shard_ranks), Axis(across.shard_ranks, placement)))
        if divisor is not None:
            self.divisor = divisor
        self.inside, self.across = inside, across
        self.node, self.num_nodes = across.rank, across.shard_ranks

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0 and self.node == 0

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        return self.inside.bind_gather(payload, shard, full)

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Inside the node, which has all shards once; other nodes come to the same."""
        self.inside.all_reduce(tensor, op)

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        if self.node == 0:
            self.inside.scatter_from_rank0(shard, full)
        self.across.broadcast_from_rank0(shard)

    def broadcast_from_rank0(self, tensor: Tensor) -> None:
        if self.node == 0:
            self.inside.broadcast_from_rank0(tensor)
        self.across.broadcast_from_rank0(tensor)

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        self.inside.gather_to_all(shard, full)

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        if self.node == 0:
            self.inside.gather_to_rank0(shard, full)

    def all_to_all(self, what: str, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        self.inside.all_to_all(what, sent, received)

    def meet(self) -> None:
        self.inside.meet()
        self.across.meet()

    def drain(self) -> None:
        self.inside.drain()
        self.across.drain()

    def abandon(self) -> None:
        self.inside.abandon()
        self.across.abandon()


class Chain:
    """One collective in stages, each of which starts when the one before has ended."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._starts, self._ends = zip(*stages, strict=True)
        self._last = len(stages) - 1
        self._at = 0

    @property
    def is_in_last_stage(self) -> bool:
        return self._at == self._last

    def start(self) -> None:
        self._at = 0
        self._starts[0]()

    def advance(self) -> None:
        """Wait for the stage under way and start the next one."""
        self._ends[self._at]()
        self._at += 1
        self._starts[self._at]()

    def end(self) -> None:
        self._ends[self._at]()


class GlooHierarchy(HierarchicalComm):
    """CPU tensors over gloo.

    Args:
        inside: sums gradients undivided.
    """

    backend = GLOO

    def __init__(self, inside: GlooComm | LocalComm, across: GlooAcross, *, divisor: float | None = None) -> None:
        super().__init__(inside, across, divisor=divisor)
        self._across = across
        self._under_way: list[Chain] = []
        """Reductions from start to wait, in the order of their starts."""

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        aside = room[-payload.slice_numel :] if room is not None and accumulate else shard
        divisor: float = 1 if is_half(payload) else self.divisor  # halves are divided first, lest a node's sum overflow
        if self.shard_ranks == 1:
            result = full if accumulate else shard
            (begin, end), *others = self._across.bind_all_reduce(payload, full, aside, result, divisor)
            if is_half(payload):
                begin = in_turn(partial(full.div_, self.divisor), begin)
            stages = [(begin, end), *others]
        else:
            result = aside
            within = self.inside.bind_reduce(payload, full, room, aside, accumulate=False)
            stages = [within.stage]
            stages += self._across.bind_all_reduce(payload, aside, full, aside, divisor)
        chain, under_way = Chain(stages), self._under_way

        def start() -> None:
            chain.start()
            for older in under_way:
                if not older.is_in_last_stage:
                    older.advance()
            under_way.append(chain)

        def wait() -> None:
            under_way.remove(chain)
            while not chain.is_in_last_stage:
                chain.advance()
            for other in under_way:
                if not other.is_in_last_stage:
                    other.advance()
                    break
            chain.end()
            if accumulate:
                shard.add_(result)

        return Bound(start, wait)

    def abandon(self) -> None:
        super().abandon()
        self._under_way.clear()


class GlooAcross(GlooComm):
    """The ranks with the same shard, one of each node."""

    def bind_all_reduce(
        self, payload: Payload, source: Tensor, landing: Tensor, result: Tensor, divisor: float
    ) -> list[Stage]:
        """The stages that sum `source` over the nodes, in their order, and divide the sum.

        Args:
            source: [slice_numel]; its contents are undefined afterwards, if it is not the result.
            landing: what others send arrives here: at least [slice_numel], other memory than `source`.
            result: where the quotient goes: `source`, or `landing` [slice_numel].
        """
        result_is_source = result.data_ptr() == source.data_ptr()
        if self.shard_ranks > 2:
            return self._bind_in_parts(payload, source, landing, None if result_is_source else result, divisor)
        landing = landing[: source.numel()]
        peer = 1 - self.rank
        other = landing if result_is_source else source

        def finish() -> None:
            result.add_(other)  # of two terms the order does not matter
            result.div_(divisor)

        return [self._exchange("reduction across nodes", payload, [(landing, peer)], [(source, peer)], finish)]

    def _bind_in_parts(
        self, payload: Payload, source: Tensor, landing: Tensor, result: Tensor | None, divisor: float
    ) -> list[Stage]:
        """Each node sums a part and sends it to the others: fewer bytes than whole shards (`sent_across_numel`)."""
        size = -(-source.numel() // self.shard_ranks)
        parts = [source[size * node :][:size] for node in range(self.shard_ranks)]
        own, peers = parts[self.rank], self._peers
        if landing.numel() < len(peers) * own.numel():  # a shard of fewer elements than nodes squared
            landing = torch.empty(len(peers) * own.numel(), dtype=source.dtype)
        slots = {peer: landing[own.numel() * i :][: own.numel()] for i, peer in enumerate(sorted(peers))}
        before, behind = (
            [slots[n] for n in range(self.rank)],
            [slots[n] for n in range(self.rank + 1, self.shard_ranks)],
        )
        into = parts if result is None else [result[size * node :][:size] for node in range(self.shard_ranks)]

        def total() -> None:
            for term in before[1:]:
                before[0].add_(term)
            for term in (*before[:1], *behind):
                own.add_(term)
            own.div_(divisor)
            if result is not None:
                into[self.rank].copy_(own)

        reduced = self._exchange(
            "reduction across nodes",
            payload,
            [(slots[peer], peer) for peer in peers],
            [(parts[peer], peer) for peer in peers],
            total,
        )
        gathered = self._exchange(
            "gather across nodes", payload, [(into[peer], peer) for peer in peers], [(own, peer) for peer in peers]
        )
        return [reduced, gathered]

    def _exchange(
        self,
        word: str,
        payload: Payload,
        receives: Iterable[tuple[Tensor, int]],
        sends: Iterable[tuple[Tensor, int]],
        finish: Callable[[], object] | None = None,
    ) -> Stage:
        """Messages from and to other nodes; `finish` is called when all have come and gone."""
        start, all_came = self.bind_messages(self.what(word, payload), message_tag(word, payload), receives, sends)
        if finish is None:
            return start, all_came

        def end() -> None:
            all_came()
            finish()

        return start, end


class NcclHierarchy(HierarchicalComm):
    """CUDA tensors over NCCL. The order of sums is NCCL's, the same on all nodes.

    What starts later waits for the all-reduce across nodes, as on one channel: `streams.py` takes it that collectives
    end in the order of their starts.
    """

    backend = NCCL

    def __init__(self, inside: NcclComm | LocalComm, across: NcclComm, *, divisor: float | None = None) -> None:
        super().__init__(inside, across, divisor=divisor)
        self._across, self.chosen_divisor = across, divisor

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        if self.shard_ranks == 1:
            average, within = full, ()
        else:
            average = shard if room is None else room
            within = self.inside.bind_reduce(payload, full, None, average, accumulate=False)
        before, behind = quotient(payload, self.chosen_divisor, full, average)
        options = dist.AllreduceOptions()
        options.reduceOp = reduce_op(self.chosen_divisor)
        call, what = self._across.group.allreduce, self._across.what("reduction across nodes", payload)
        across = self._across.bind_work(partial(call, [average], options), what, orders_at_start=True)
        bring = shard.add_ if accumulate else shard.copy_
        done = partial(bring, average) if accumulate or average is not shard else None
        return Bound(in_turn(before, *within, across.start), across.wait).then(behind, done)
