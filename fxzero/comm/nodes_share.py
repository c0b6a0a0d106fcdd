"""Collectives of a 2-D mesh whose nodes share the shards: each has a stage inside a node and one across nodes.

gather          across: a column gathers the parts of its slice; inside: a row gathers slices into the bucket
again           inside alone, from the slice that was kept: the secondary shard
reduce-scatter  inside: the slice of this rank, summed over the node; across: that cut over the nodes, each part summed
                in their order and divided by the number of all ranks: ((g00 + g01) + (g10 + g11)) / 4

A gradient so has the bits that it has where nodes are replicas, and crosses nodes once, as one slice less its part.
Gradients in float16 are divided before the first sum, lest that overflow.

gloo tells that a message is there only to those who wait for it. A second stage so starts at a later start of another
collective, when compute has run since its own, or at its own wait:

    start g0 | start g1 | wait g0: inside, both waited for | compute 0 | start g2: g1 inside | wait g1 | compute 1 ...

Ranks start collectives in one order, each starts second stages in that order too, and none waits for a first stage
while an older collective has yet to enter its second. So of all collectives that ranks are blocked at, the oldest goes
on: a rank it waits for is not blocked, or blocked at a younger one and past all starts of this. Where waits stand does
not matter, so ranks may have different shapes in one step.

Source: ZeRO++ (arXiv:2306.10209), hpZ; deviation: gradients are reduced in two stages over the same mesh.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.base import Bound, Stage, in_turn
from fxzero.comm.gloo import GLOO, GlooComm
from fxzero.comm.group import GroupComm
from fxzero.comm.nccl import NCCL, NcclComm, quotient, reduce_options
from fxzero.comm.nodes_replicate import Chain, HierarchicalComm
from fxzero.graph.layout import Payload
from fxzero.graph.stages import stage_across, stage_inside


class ShardedHierarchy(HierarchicalComm):
    """The ranks of all nodes as one group: rank r of node n is number r * num_nodes + n."""

    def __init__(self, inside: GroupComm, across: GroupComm, *, divisor: float | None = None) -> None:
        super().__init__(inside, across, "shard", divisor=divisor)
        self.rank = inside.rank * self.num_nodes + self.node

    def _slice_of(self, full: Tensor) -> Tensor:
        """What this rank sends inside its node of a bucket, flat."""
        return full.chunk(self.inside.shard_ranks)[self.inside.rank]

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        return self.bind_gather_keeping(payload, shard, full, self._slice_of(full))

    def bind_gather_inside(self, payload: Payload, secondary: Tensor, full: Tensor) -> Bound:
        return self.inside.bind_gather(stage_inside(payload, self.num_nodes), secondary, full)

    def _gather_stages(self, payload: Payload, shard: Tensor, full: Tensor, secondary: Tensor) -> list[Stage]:
        across = self.across.bind_gather(stage_across(payload, self.num_nodes), shard, secondary)
        return [across.stage, self.bind_gather_inside(payload, secondary, full).stage]

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        self.inside.all_reduce(tensor, op)
        self.across.all_reduce(tensor, op)

    def scatter_from_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        own_slice = None
        if self.node == 0:
            own_slice = self._room_for_slice(shard)
            self.inside.scatter_from_rank0(own_slice, full)
        self.across.scatter_from_rank0(shard, own_slice)

    def gather_to_all(self, shard: Tensor, full: Tensor) -> None:
        own_slice = self._room_for_slice(shard)
        self.across.gather_to_all(shard, own_slice)
        self.inside.gather_to_all(own_slice, full)

    def gather_to_rank0(self, shard: Tensor, full: Tensor | None) -> None:
        own_slice = self._room_for_slice(shard) if self.node == 0 else None
        self.across.gather_to_rank0(shard, own_slice)
        if own_slice is not None:
            self.inside.gather_to_rank0(own_slice, full)

    def _room_for_slice(self, shard: Tensor) -> Tensor:
        return shard.new_empty(self.num_nodes * shard.numel())


class GlooShardedHierarchy(ShardedHierarchy):
    """CPU tensors over gloo.

    Args:
        inside: sums gradients undivided.
        across: divides by the number of all ranks, or by the chosen divisor.
    """

    backend = GLOO

    def __init__(self, inside: GlooComm, across: GlooComm, *, divisor: float | None = None) -> None:
        super().__init__(inside, across, divisor=divisor)
        self._under_way = _UnderWay()

    def bind_gather_keeping(self, payload: Payload, shard: Tensor, full: Tensor, secondary: Tensor) -> Bound:
        return self._under_way.bind(self._gather_stages(payload, shard, full, secondary), is_gather=True)

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        within, between = stage_inside(payload, self.num_nodes), stage_across(payload, self.num_nodes)
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        assert room is not None
        own_slice, others = room[: within.slice_numel], room[within.slice_numel :]
        stages = [
            self.inside.bind_reduce(within, full, others, own_slice, accumulate=False).stage,
            # The bucket is free once the first stage is over: what other nodes send arrives there.
            self.across.bind_reduce(between, own_slice, full, shard, accumulate=accumulate).stage,
        ]
        return self._under_way.bind(stages, is_gather=False)

    def abandon(self) -> None:
        super().abandon()
        self._under_way.clear()


class _UnderWay:
    """Collectives in two stages from start to wait, in the order of their starts; see the module docstring."""

    def __init__(self) -> None:
        self._chains: list[_Timed] = []
        self._num_waits = 0

    def bind(self, stages: Sequence[Stage], *, is_gather: bool) -> Bound:
        chain, chains = _Timed(stages, is_gather), self._chains

        def start() -> None:
            chain.start()
            older = self._oldest_in_first_stage()
            if older is not None and self._has_had_compute(older, is_gather):
                older.advance()
            chain.num_waits_before = self._num_waits
            chains.append(chain)

        def wait() -> None:
            while not chain.is_in_last_stage:
                older = self._oldest_in_first_stage()
                assert older is not None
                older.advance()
            chains.remove(chain)
            if not is_gather and (other := self._oldest_in_first_stage()) is not None and not other.is_gather:
                other.advance()
            chain.end()
            self._num_waits += 1

        return Bound(start, wait)

    def _oldest_in_first_stage(self) -> _Timed | None:
        for chain in self._chains:
            if not chain.is_in_last_stage:
                return chain
        return None

    def _has_had_compute(self, chain: _Timed, before_gather: bool) -> bool:
        """True if compute ran since the start of a collective, so that waiting for its first stage takes least.

        A gradient is computed between any two reductions; gathers may start in a row.
        """
        return chain.num_waits_before < self._num_waits or not (chain.is_gather or before_gather)

    def clear(self) -> None:
        """Forget all, after they were abandoned."""
        self._chains.clear()


class _Timed(Chain):
    """A collective, and how many had been waited for when it started."""

    def __init__(self, stages: Sequence[Stage], is_gather: bool) -> None:
        super().__init__(stages)
        self.is_gather = is_gather
        self.num_waits_before = 0


class NcclShardedHierarchy(ShardedHierarchy):
    """CUDA tensors over NCCL. The order of sums is NCCL's.

    Both stages follow each other on the communication stream. What starts later waits for a reduction's second one:
    `streams.py` takes it that collectives end in the order of their starts.
    """

    backend = NCCL

    def __init__(self, inside: NcclComm, across: NcclComm, *, divisor: float | None = None) -> None:
        super().__init__(inside, across, divisor=divisor)
        self._across, self.chosen_divisor = across, divisor

    def bind_gather_keeping(self, payload: Payload, shard: Tensor, full: Tensor, secondary: Tensor) -> Bound:
        (start_across, wait_across), (start_inside, wait_inside) = self._gather_stages(payload, shard, full, secondary)

        def start() -> None:
            start_across()
            wait_across()  # orders the stream that is current, the host goes on
            start_inside()

        return Bound(start, wait_inside)

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        assert room is not None
        within = stage_inside(payload, self.num_nodes)
        own_slice = room[: within.slice_numel]
        average = room[within.slice_numel :] if accumulate else shard
        inside = self.inside.bind_reduce(within, full, None, own_slice, accumulate=False)
        before, behind = quotient(payload, self.chosen_divisor, full, average)
        options = reduce_options(self.chosen_divisor)
        call = partial(torch_internals.reduce_scatter_base(self._across.group), average, own_slice, options)
        what = self._across.what("reduce-scatter across nodes", payload)
        across = self._across.bind_work(call, what, orders_at_start=True)
        return Bound(in_turn(before, *inside, across.start), across.wait).then(
            behind, partial(shard.add_, average) if accumulate else None
        )
