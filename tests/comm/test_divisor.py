"""Sums of gradients divided by a chosen number: on one group and on nodes, over gloo and by the calls for NCCL."""

import functools

import torch
import torch.distributed as dist

from fxzero.comm.base import Comm, LocalComm
from fxzero.comm.make import make_comm
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_replicate import NcclHierarchy
from fxzero.comm.nodes_share import NcclShardedHierarchy
from fxzero.testing import run_ranks
from tests.distributed.mesh_shard_workers import make_hierarchy as make_sharing
from tests.distributed.mesh_workers import make_hierarchy as make_replicas
from tests.helpers.payloads import make_payload, poisoned, reduced, values

CPU = torch.device("cpu")
HALF, SINGLE = torch.float16, torch.float32


def check(comm: Comm, rank: int, world_size: int, divisor: float, ranks_per_node: int, *, exact: bool = True) -> None:
    """A reduction that overwrites and one that adds; halves whose sum overflows where the quotient does not."""
    for dtype in (SINGLE, HALF):
        payload = make_payload(comm.shard_ranks, dtype, f"{type(comm).__name__}.{divisor}.{dtype}")
        ranks = [values(payload, 10 + each) for each in range(world_size)]
        nodes = [
            functools.reduce(torch.add, ranks[first:][:ranks_per_node])
            for first in range(0, world_size, ranks_per_node)
        ]
        whole = functools.reduce(torch.add, nodes) / divisor
        own = whole.split(payload.slice_numel)[comm.rank]
        for accumulate in (False, True):
            shard = torch.ones(payload.slice_numel, dtype=dtype) if accumulate else poisoned(payload.slice_numel, dtype)
            reduced(comm, payload, ranks[rank].clone(), shard, accumulate=accumulate)
            tolerance = 1e-2 if dtype is HALF else 0 if exact else 1e-5
            torch.testing.assert_close(shard, accumulate + own, rtol=tolerance, atol=tolerance)
    if divisor >= world_size:
        payload = make_payload(comm.shard_ranks, HALF, f"{type(comm).__name__}.{divisor}.large")
        shard = torch.empty(payload.slice_numel, dtype=HALF)
        reduced(comm, payload, torch.full((payload.numel,), 40_000.0, dtype=HALF), shard, accumulate=False)
        torch.testing.assert_close(shard, torch.full_like(shard, 40_000.0 * world_size / divisor))


def on_one_group(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    for divisor in (1, 2.5, 5.0):
        comm = make_comm(None, CPU, divisor=divisor)
        assert comm.divisor == divisor
        check(comm, rank, world_size, divisor, world_size)
        check(NcclComm(group, divisor=divisor), rank, world_size, divisor, world_size, exact=False)


def on_nodes(rank: int, world_size: int) -> None:
    shape = (2, 2)
    for make in (make_replicas, make_sharing):
        groups = make(shape)
        for divisor in (1, 5.0):
            comm = make_comm(groups, CPU, divisor=divisor)
            assert comm.divisor == divisor
            check(comm, rank, world_size, divisor, 2)
            inside, across = NcclComm(groups.inside, divisor=1), NcclComm(groups.across)
            kind = NcclShardedHierarchy if make is make_sharing else NcclHierarchy
            check(kind(inside, across, divisor=divisor), rank, world_size, divisor, 2, exact=False)


def test_sums_of_one_group_are_divided() -> None:
    run_ranks(3, on_one_group)


def test_sums_of_nodes_are_divided() -> None:
    run_ranks(4, on_nodes)


def test_gradients_of_one_rank_alone_are_divided() -> None:
    check(LocalComm(2.5), 0, 1, 2.5, 1)
