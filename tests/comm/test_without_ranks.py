"""Collectives without a process group: alone, planned for a cluster that is not there, and what is refused."""

import pytest
import torch
import torch.distributed as dist

from fxzero.comm.base import Comm, LocalComm
from fxzero.comm.make import backend_for, make_comm
from fxzero.comm.without_ranks import PlanningComm
from fxzero.errors import PlanError
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding
from tests.helpers.payloads import one_payload

CPU = torch.device("cpu")


def make_payload(num_ranks: int) -> Payload:
    return one_payload(num_ranks, 10, 10)


def test_nothing_is_to_be_done_when_one_rank_shares_the_memory() -> None:
    comm = make_comm(None, CPU)
    assert isinstance(comm, LocalComm)
    assert comm.gathers_in_place
    payload = make_payload(1)
    shard = torch.arange(float(payload.numel))
    assert comm.reduce_scratch_numel(payload) == 0
    assert comm.bind_gather(payload, shard, shard) == (None, None)
    assert comm.bind_reduce(payload, shard, None, shard, accumulate=False) == (None, None)


def test_one_rank_adds_or_copies_when_gradients_lie_apart() -> None:
    comm, payload = LocalComm(), make_payload(1)
    shard, full = torch.ones(payload.numel), torch.full((payload.numel,), 2.0)
    start, wait = comm.bind_reduce(payload, full, None, shard, accumulate=True)
    assert start is None and wait is not None
    wait()
    assert shard.eq(3.0).all()
    start, wait = comm.bind_reduce(payload, full, None, shard, accumulate=False)
    assert start is None and wait is not None
    wait()
    assert shard.eq(2.0).all()
    start, wait = comm.bind_gather(payload, shard, full.zero_())
    assert start is None and wait is not None
    wait()
    assert full.eq(2.0).all()


def test_one_rank_keeps_its_values_in_every_blocking_operation() -> None:
    comm = LocalComm()
    values, into = torch.arange(4.0), torch.zeros(4)
    comm.all_reduce(values)
    comm.broadcast_from_rank0(values)
    for move in (comm.gather_to_all, comm.gather_to_rank0):
        move(values, into.zero_())
        assert into.equal(values)
    comm.scatter_from_rank0(into.zero_(), values)
    assert into.equal(values)
    comm.drain()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_planned_scratch_is_that_of_the_backend(world_size: int) -> None:
    """gloo receives from all others, one of them into the shard if that is overwritten; NCCL reduces by itself."""
    payload = make_payload(world_size)
    alone = world_size == 1
    for device, overwrite, accumulate in (("cpu", world_size - 2, world_size - 1), ("cuda", 0, 1)):
        comm = PlanningComm(0, Sharding.over(world_size), backend_for(torch.device(device)))
        shards = [comm.reduce_scratch_numel(payload, accumulate=each) / payload.slice_numel for each in (False, True)]
        assert shards == ([0, 0] if alone else [overwrite, accumulate])
        assert comm.gathers_in_place == alone


def refused(comm: Comm) -> None:
    payload = make_payload(8)
    tensor = torch.empty(payload.numel)
    for call in (
        lambda: comm.bind_gather(payload, tensor, tensor),
        lambda: comm.bind_reduce(payload, tensor, None, tensor, accumulate=False),
        lambda: comm.all_reduce(tensor),
        lambda: comm.scatter_from_rank0(tensor, None),
        lambda: comm.broadcast_from_rank0(tensor),
        lambda: comm.gather_to_all(tensor, tensor),
        lambda: comm.gather_to_rank0(tensor, None),
    ):
        with pytest.raises(PlanError, match="rank 3 of 8 of a process group that is not there"):
            call()


def test_planning_rank_refuses_to_run() -> None:
    refused(PlanningComm(3, Sharding.over(8), backend_for(CPU)))


def test_fake_process_group_gives_a_planning_rank() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        comm = make_comm(None, CPU)
        assert isinstance(comm, PlanningComm)
        refused(comm)
    finally:
        dist.destroy_process_group()
