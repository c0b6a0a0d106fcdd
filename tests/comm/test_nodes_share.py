"""Nodes that share shards, without any rank: plans, memory, refusals, and the order of calls on NCCL."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.comm.make import backend_for
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_share import NcclShardedHierarchy
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding
from fxzero.graph.stages import stage_across, stage_inside
from fxzero.passes import default_passes
from fxzero.planner import plan
from fxzero.testing import engine_of
from tests.comm.test_nodes_replicate import RecordedGroup, WithLoss
from tests.helpers.payloads import one_payload

EACH_ALONE = default_passes(bucket_bytes=1)


def planned(world_size: int, num_nodes: int = 1, across: Any = "replicate", **options: Any) -> fxzero.Schedule:
    options.setdefault("passes", EACH_ALONE)
    return plan(WithLoss(), (torch.zeros(4, 64),), world_size=world_size, num_nodes=num_nodes, across=across, **options)


@pytest.mark.parametrize(("num_nodes", "ranks_inside"), [(2, 2), (2, 4), (3, 2)])
def test_stages_cut_a_bucket_into_slices_and_slices_into_shards(num_nodes: int, ranks_inside: int) -> None:
    payload = one_payload(num_nodes * ranks_inside, 1000, 3)
    inside, across = stage_inside(payload, num_nodes), stage_across(payload, num_nodes)
    assert (inside.num_slices, inside.slice_numel) == (ranks_inside, num_nodes * payload.slice_numel)
    assert (across.num_slices, across.slice_numel) == (num_nodes, payload.slice_numel)
    assert inside.numel == payload.numel and across.numel == inside.slice_numel
    assert inside.fqns == across.fqns == payload.fqns


def test_bytes_across_are_a_part_of_each_slice() -> None:
    nodes, one_group = planned(8, 2, "shard"), planned(8)
    t, flat = nodes.totals, one_group.totals
    parameters = sum(start.payload_of(node).nbytes for start, node in forward_gathers(nodes))
    assert t.gathered_across_bytes == parameters // 8
    assert t.across_bytes - t.gathered_across_bytes == parameters // 8
    assert t.gathered_bytes == flat.gathered_bytes - (parameters_again(nodes) // 8)
    assert t.reduced_bytes == flat.reduced_bytes
    replicas = planned(8, 2).totals
    assert t.across_bytes - t.gathered_across_bytes == pytest.approx(replicas.across_bytes / 2, rel=0.1)


class TwoDimensions:
    """As much of a mesh as is looked at before its groups."""

    ndim = 2


def forward_gathers(schedule: fxzero.Schedule) -> list[tuple[Any, Any]]:
    from fxzero.graph.nodes import Role, is_inside

    return [(schedule.step, node) for node in schedule.step.nodes(Role.ALL_GATHER) if not is_inside(node)]


def parameters_again(schedule: fxzero.Schedule) -> int:
    """Bytes of the buckets that are gathered twice."""
    return sum(bucket.nbytes for bucket in schedule.step.secondaries().values())


@pytest.mark.parametrize("across", ["replicate", "shard"])
def test_all_bytes_of_nodes_are_timed_as_of_one_link(across: str) -> None:
    cluster = fxzero.Cluster(fxzero.Device(1e9, 1e9), fxzero.Link(1e6))
    nodes = planned(8, 2, across, cluster=cluster)
    sent = nodes.totals.gathered_bytes + nodes.totals.reduced_bytes
    assert nodes.timing.timeline.wire_s == pytest.approx(sent / 1e6)
    assert 0.8 * sent / 1e6 < nodes.timing.bound.link_s <= sent / 1e6  # which has no padding
    assert 1.0 <= nodes.timing.ratio < 1.3


@pytest.mark.parametrize("across", ["replicate", "shard"])
def test_bytes_inside_a_node_take_its_own_link(across: str) -> None:
    cluster = fxzero.Cluster(fxzero.Device(1e9, 1e9), fxzero.Link(1e6), fxzero.Link(1e7))
    nodes = planned(8, 2, across, cluster=cluster)
    sent = nodes.totals.gathered_bytes + nodes.totals.reduced_bytes
    inside = sent - nodes.totals.across_bytes
    assert nodes.timing.timeline.wire_s == pytest.approx(nodes.totals.across_bytes / 1e6 + inside / 1e7)
    assert 1.0 <= nodes.timing.ratio < 1.6
    slower = nodes.timing.at_rate(1e5).timeline.wire_s
    assert slower == pytest.approx(nodes.totals.across_bytes / 1e5 + inside / 1e7)


def test_secondary_shards_are_planned_as_memory_that_is_held() -> None:
    nodes, flat = planned(8, 2, "shard"), planned(8)
    held, rows = nodes.memory.footprint.held, dict(nodes.memory.rows())
    assert held.secondaries == rows["parameters (secondary shards)"] == parameters_again(nodes) // 4 > 0
    assert held.total - held.secondaries == flat.memory.footprint.held.total
    assert "secondary" not in str(flat.memory) and "secondary" in str(nodes.memory)
    assert held.secondaries + held.parameters < planned(4).memory.footprint.held.parameters * 1.6
    kept = planned(8, 2, "shard", passes=default_passes(bucket_bytes=1, max_kept_bytes=None))
    assert kept.memory.footprint.held.secondaries == 0


def test_a_budget_counts_secondary_shards() -> None:
    lean = planned(8, 2, "shard").memory.planned_peak_bytes
    for budget in (lean, 2 * lean):
        memory = planned(8, 2, "shard", memory_budget=budget).memory
        assert memory.planned_peak_bytes <= budget
    assert memory.footprint.held.secondaries == 0  # all is kept
    with pytest.raises(fxzero.PlanError, match="memory_budget is"):
        planned(8, 2, "shard", memory_budget=lean // 2)


@pytest.mark.parametrize(("world_size", "num_nodes"), [(4, 1), (4, 4), (1, 1)])
def test_one_node_and_nodes_of_one_rank_are_one_group(world_size: int, num_nodes: int) -> None:
    assert str(planned(world_size, num_nodes, "shard")) == str(planned(world_size))


def test_what_nodes_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="across is 'both'; it must be one of 'replicate', 'shard'"):
        planned(4, 2, "both")
    with pytest.raises(ValueError, match="across is 'both'; it must be one of 'replicate', 'shard'"):
        fxzero.compile(WithLoss(), across="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'across="shard" is about the nodes of a 2-D mesh'):
        fxzero.compile(WithLoss(), across="shard")
    with pytest.raises(ValueError, match="On a 2-D mesh gradients travel as they are; drop reduce_dtype"):
        fxzero.compile(WithLoss(), mesh=TwoDimensions(), reduce_dtype=torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_nodes is 3; it must divide the world_size of 8"):
        planned(8, 3, "shard")


def test_fake_ranks_of_a_mesh_plan_and_refuse_lists_of_tensors() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replicate", "shard"))
        zero = fxzero.compile(WithLoss(), mesh=mesh, across="shard", example=torch.zeros(4, 64))
        comm = engine_of(zero).sharded.comm
        assert isinstance(comm, PlanningComm)
        assert (comm.rank, comm.shard_ranks, comm.sharding.num_nodes) == (1 * 2 + 1, 8, 2)
        assert str(zero.schedule) == str(planned(8, 2, "shard", passes=None))
        with pytest.raises(ValueError, match="no collectives of lists of tensors"):
            fxzero.compile(WithLoss(), mesh=mesh, across="shard", without="all")
    finally:
        dist.destroy_process_group()


class RecordedGroupOfNodes(RecordedGroup):
    """Without all-reduces, which nodes that share shards have none of."""

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        raise AssertionError("a reduction over nodes needs no all-reduce")


def recorded(ranks_inside: int, num_nodes: int) -> tuple[NcclShardedHierarchy, Payload, list[str]]:
    log: list[str] = []
    groups: list[Any] = [
        RecordedGroupOfNodes("inside", ranks_inside, log),
        RecordedGroupOfNodes("across", num_nodes, log),
    ]
    comm = NcclShardedHierarchy(*map(NcclComm, groups))
    return comm, one_payload(ranks_inside * num_nodes, 3000), log


@pytest.mark.parametrize("accumulate", [False, True])
def test_nccl_reduces_inside_and_then_across_on_one_stream(accumulate: bool) -> None:
    comm, payload, log = recorded(2, 3)
    needed = comm.reduce_scratch_numel(payload, accumulate=accumulate)
    planned_comm = PlanningComm(0, Sharding.over(6, 3, "shard"), backend_for(torch.device("cuda")))
    assert planned_comm.reduce_scratch_numel(payload, accumulate=accumulate) == needed
    full, shard, scratch = torch.ones(payload.numel), torch.ones(payload.slice_numel), torch.zeros(needed)
    start, wait = comm.bind_reduce(payload, full, scratch, shard, accumulate=accumulate)
    assert start is not None and wait is not None
    start()
    assert log == [
        "reduce_scatter inside",
        "wait for reduce_scatter inside",
        "reduce_scatter across",
        "wait for reduce_scatter across",
    ]
    wait()
    assert log[4:] == ["wait for reduce_scatter across"]
    with pytest.raises(ValueError, match=f"at least {needed} elements"):
        comm.bind_reduce(payload, full, scratch[1:], shard, accumulate=accumulate)


def test_nccl_gathers_across_and_then_inside_and_again_inside_alone() -> None:
    comm, payload, log = recorded(2, 3)
    shard, full = torch.ones(payload.slice_numel), torch.zeros(payload.numel)
    secondary = torch.zeros(stage_inside(payload, 3).slice_numel)
    for bound in (comm.bind_gather(payload, shard, full), comm.bind_gather_keeping(payload, shard, full, secondary)):
        log.clear()
        assert bound.start is not None and bound.wait is not None
        bound.start()
        assert log == ["all_gather across", "wait for all_gather across", "all_gather inside"]
        bound.wait()
        assert log[3:] == ["wait for all_gather inside"]
    log.clear()
    again = comm.bind_gather_inside(payload, secondary, full)
    assert again.start is not None and again.wait is not None
    again.start()
    again.wait()
    assert log == ["all_gather inside", "wait for all_gather inside"]
