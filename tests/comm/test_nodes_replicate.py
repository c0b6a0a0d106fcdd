"""Nodes that shard inside and replicate across, without any rank: bytes, plans, and the order of calls on NCCL."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.comm.base import LocalComm
from fxzero.comm.make import backend_for
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_replicate import NcclHierarchy
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.sharding import Sharding
from fxzero.graph.stages import sent_across_numel
from fxzero.planner import plan
from fxzero.testing import engine_of
from tests.helpers.payloads import one_payload


class WithLoss(nn.Module):
    """A classifier that returns one number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x).square().mean()


@pytest.mark.parametrize(("num_nodes", "sent"), [(1, 0), (2, 960), (3, 1280), (4, 1440), (8, 1680)])
def test_two_nodes_exchange_a_shard_and_more_reduce_parts(num_nodes: int, sent: int) -> None:
    assert sent_across_numel(960, num_nodes) == sent


def test_bytes_inside_and_across_are_planned_for_nodes_that_are_not_there() -> None:
    x = torch.zeros(4, 64)
    nodes = plan(WithLoss(), (x,), world_size=8, num_nodes=4)
    one_node = plan(WithLoss(), (x,), world_size=2)
    t, inside = nodes.totals, one_node.totals
    assert t.gathered_bytes == inside.gathered_bytes
    assert t.across_bytes == 3 * inside.reduced_bytes // 2  # 2 (N - 1) / N of the shard, of which inside sends one
    assert t.reduced_bytes == inside.reduced_bytes + t.across_bytes
    assert inside.across_bytes == 0
    assert str(nodes).splitlines()[1:] == str(one_node).splitlines()[1:]
    header = str(nodes).splitlines()[0].split("  ")
    assert header[0] == "world_size=8 (4 nodes of 2)"
    assert header[1].endswith("received inside") and header[2].endswith("across") and "sent inside, " in header[2]
    assert nodes.memory.planned_peak_bytes == one_node.memory.planned_peak_bytes


def test_nodes_of_one_rank_are_planned_with_gradients_beside_their_shards() -> None:
    x = torch.zeros(4, 64)
    alone, nodes = plan(WithLoss(), (x,), world_size=1), plan(WithLoss(), (x,), world_size=2, num_nodes=2)
    assert nodes.totals.gathered_bytes == 0
    assert nodes.totals.across_bytes == nodes.totals.reduced_bytes > 0
    assert nodes.memory.planned_peak_bytes > alone.memory.planned_peak_bytes


@pytest.mark.parametrize("num_nodes", [0, 3])
def test_ranks_that_nodes_do_not_share_evenly_are_refused(num_nodes: int) -> None:
    with pytest.raises(ValueError, match=f"num_nodes is {num_nodes}; it must divide the world_size of 8"):
        plan(WithLoss(), (torch.zeros(4, 64),), world_size=8, num_nodes=num_nodes)


def test_fake_ranks_of_a_mesh_plan_and_show_their_schedule() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        zero = fxzero.compile(WithLoss(), mesh=mesh, example=torch.zeros(4, 64))
        comm = engine_of(zero).sharded.comm
        assert isinstance(comm, PlanningComm)
        assert (comm.rank, comm.shard_ranks, comm.sharding.num_nodes) == (1, 4, 2)
        expected = plan(WithLoss(), torch.zeros(4, 64), world_size=8, num_nodes=2)
        assert str(zero.schedule) == str(expected)
    finally:
        dist.destroy_process_group()


class RecordedGroup:
    """A process group whose calls and waits are written down."""

    def __init__(self, name: str, size: int, log: list[str]) -> None:
        self.name, self._size, self.log = name, size, log

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self._size

    def _record(self, what: str) -> Any:
        self.log.append(f"{what} {self.name}")
        return RecordedWork(f"{what} {self.name}", self.log)

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        assert options.reduceOp == dist.ReduceOp.AVG
        return self._record("all_reduce")

    def _reduce_scatter_base(self, shard: torch.Tensor, full: torch.Tensor, options: Any) -> Any:
        return self._record("reduce_scatter")

    def _allgather_base(self, full: torch.Tensor, shard: torch.Tensor) -> Any:
        return self._record("all_gather")


class RecordedWork:
    """What a recorded call returns."""

    def __init__(self, what: str, log: list[str]) -> None:
        self.what, self.log = what, log

    def wait(self) -> None:
        self.log.append(f"wait for {self.what}")


def recorded_nccl(ranks_inside: int, accumulate: bool) -> tuple[list[str], list[str]]:
    """The calls of the start and of the wait of a reduction over two nodes."""
    log: list[str] = []
    groups: list[Any] = [RecordedGroup("inside", ranks_inside, log), RecordedGroup("across", 2, log)]
    comm = NcclHierarchy(LocalComm() if ranks_inside == 1 else NcclComm(groups[0]), NcclComm(groups[1]))
    payload = one_payload(ranks_inside, 256)
    scratch = torch.zeros(comm.reduce_scratch_numel(payload, accumulate=accumulate))
    planned = PlanningComm(0, Sharding.over(2 * ranks_inside, 2), backend_for(torch.device("cuda")))
    assert planned.reduce_scratch_numel(payload, accumulate=accumulate) == scratch.numel()
    full, shard = torch.ones(payload.numel), torch.full((payload.slice_numel,), 5.0)
    start, wait = comm.bind_reduce(payload, full, scratch, shard, accumulate=accumulate)
    assert start is not None and wait is not None
    start()
    started = list(log)
    wait()
    if ranks_inside == 1:
        assert shard.eq(6.0 if accumulate else 1.0).all()
    return started, log[len(started) :]


@pytest.mark.parametrize("accumulate", [False, True])
def test_nccl_reduces_inside_and_then_across_on_one_stream(accumulate: bool) -> None:
    started, waited = recorded_nccl(2, accumulate)
    assert started == [
        "reduce_scatter inside",
        "wait for reduce_scatter inside",
        "all_reduce across",
        "wait for all_reduce across",
    ]
    assert waited == ["wait for all_reduce across"]


@pytest.mark.parametrize("accumulate", [False, True])
def test_nccl_reduces_across_alone_when_a_node_is_one_rank(accumulate: bool) -> None:
    started, waited = recorded_nccl(1, accumulate)
    assert started == ["all_reduce across", "wait for all_reduce across"]
    assert waited == ["wait for all_reduce across"]
