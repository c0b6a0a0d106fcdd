"""What ranks do in test_mesh_shard_ranks.py: nodes of ranks that share the shards."""

import functools
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fxzero
from fxzero.comm.base import Bound
from fxzero.comm.groups import Hierarchy, group_of_mesh
from fxzero.comm.make import make_comm
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_replicate import HierarchicalComm
from fxzero.comm.nodes_share import GlooShardedHierarchy, NcclShardedHierarchy
from fxzero.graph.layout import Payload
from fxzero.graph.stages import stage_inside
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed import replicated
from tests.distributed.error_workers import error_of
from tests.distributed.mesh_workers import CPU, CountedGroup
from tests.helpers.pairs import Net, points
from tests.helpers.payloads import make_payload, poisoned, reduced, values

Shape = tuple[int, int]


def make_hierarchy(shape: Shape) -> Hierarchy:
    group = group_of_mesh(init_device_mesh("cpu", shape), "shard")
    assert isinstance(group, Hierarchy) and group.shards_across
    return group


def average(payload: Payload, shape: Shape, shard: int, seed: int) -> Tensor:
    """A shard of the mean of all ranks' values: summed in a node, then over nodes, then divided."""
    nodes: list[Tensor] = []
    for node in range(shape[0]):
        each = [values(payload, seed + shape[1] * node + rank) for rank in range(shape[1])]
        nodes.append(functools.reduce(torch.add, each))
    return (functools.reduce(torch.add, nodes) / (shape[0] * shape[1])).split(payload.slice_numel)[shard]


def start_all(bound: list[Bound]) -> None:
    for start, _ in bound:
        assert start is not None
        start()


def wait_for_all(bound: list[Bound]) -> None:
    for _, wait in bound:
        assert wait is not None
        wait()


def reduce_over_nodes(rank: int, world_size: int, shape: Shape) -> None:
    """Reductions alone, then several in flight, waited for in both orders, then after some were abandoned."""
    comm = make_comm(make_hierarchy(shape), CPU)
    assert isinstance(comm, GlooShardedHierarchy)
    assert (comm.rank, comm.shard_ranks) == (rank % shape[1] * shape[0] + rank // shape[1], world_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        payload = make_payload(world_size, dtype, f"alone.{dtype}")
        for accumulate in (False, True):
            shard = torch.ones(payload.slice_numel, dtype=dtype) if accumulate else poisoned(payload.slice_numel, dtype)
            mean = average(payload, shape, comm.rank, 10)
            reduced(comm, payload, values(payload, 10 + rank), shard, accumulate=accumulate)
            assert torch.equal(shard, 1 + mean if accumulate else mean)
    payloads = [make_payload(world_size, name=f"layers.{index}", numel=9_000 * index + 5) for index in range(5)]
    fulls = [torch.empty(payload.numel) for payload in payloads]
    shards = [torch.empty(payload.slice_numel) for payload in payloads]
    bound: list[Any] = []
    for payload, full, shard in zip(payloads, fulls, shards, strict=True):
        scratch = torch.empty(comm.reduce_scratch_numel(payload, accumulate=False))
        bound.append(comm.bind_reduce(payload, full, scratch, shard, accumulate=False))
    for step, order in enumerate([1, -1, 0, 1]):
        for index, (payload, full) in enumerate(zip(payloads, fulls, strict=True)):
            full.copy_(values(payload, 100 * step + index + rank))
        start_all(bound)
        if order == 0:
            bound[0].wait()
            comm.abandon()
            continue
        wait_for_all(bound[::order])
        comm.drain()
        for index, (payload, shard) in enumerate(zip(payloads, shards, strict=True)):
            assert torch.equal(shard, average(payload, shape, comm.rank, 100 * step + index)), (step, index)


def gather_over_nodes(rank: int, world_size: int, shape: Shape) -> None:
    """Gathers in place, leaving secondary shards, and from those; waits stand elsewhere on every rank."""
    comm = make_comm(make_hierarchy(shape), CPU)
    payloads = [make_payload(world_size, name=f"layers.{index}", numel=20_000 * index + 7) for index in range(4)]
    expected = [values(payload, index) for index, payload in enumerate(payloads)]
    shards = [full.split(b.slice_numel)[comm.rank].clone() for full, b in zip(expected, payloads, strict=True)]
    fulls = [poisoned(payload.numel, payload.dtype) for payload in payloads]
    secondaries = [poisoned(stage_inside(b, shape[0]).slice_numel, b.dtype) for b in payloads]
    arguments = list(zip(payloads, shards, fulls, secondaries, strict=True))
    in_place = [comm.bind_gather(payload, shard, full) for payload, shard, full, _ in arguments]
    keeping = [comm.bind_gather_keeping(*each) for each in arguments]
    inside = [comm.bind_gather_inside(payload, secondary, full) for payload, _, full, secondary in arguments]
    for bound in (in_place, keeping, inside, keeping[::-1]):
        if rank % 3 == 0:
            start_all(bound)
            wait_for_all(bound)
        elif rank % 3 == 1:
            for each in bound:
                start_all([each])
                time.sleep(0.01)
                wait_for_all([each])
        else:
            start_all(bound[:2])
            wait_for_all(bound[:1])
            start_all(bound[2:])
            wait_for_all(bound[:0:-1])
        comm.drain()
        for full, right in zip(fulls, expected, strict=True):
            assert torch.equal(full, right)
            full.fill_(float("nan"))
    for secondary, right in zip(secondaries, expected, strict=True):
        assert torch.equal(secondary, right.chunk(shape[1])[rank % shape[1]])


def move_from_rank_0(rank: int, world_size: int, shape: Shape) -> None:
    comm = make_comm(make_hierarchy(shape), CPU)
    assert comm.is_rank0 == (rank == 0)
    payload = make_payload(world_size)
    expected = values(payload, 3)
    shard = poisoned(payload.slice_numel, payload.dtype)
    comm.scatter_from_rank0(shard, expected.clone() if rank == 0 else None)
    assert torch.equal(shard, expected.split(payload.slice_numel)[comm.rank])
    full = poisoned(payload.numel, payload.dtype)
    comm.gather_to_all(shard, full)
    assert torch.equal(full, expected)
    comm.gather_to_rank0(shard, full.zero_() if rank == 0 else None)
    assert rank != 0 or torch.equal(full, expected)
    flag = torch.tensor(rank)
    comm.broadcast_from_rank0(flag)
    assert flag == 0
    total = torch.tensor(float(comm.rank))
    comm.all_reduce(total, "max")
    assert total == world_size - 1
    comm.all_reduce(total)
    assert total == world_size * (world_size - 1)


def nccl_code_on_gloo(rank: int, world_size: int, shape: Shape) -> None:
    """The calls that NcclShardedHierarchy makes exist in gloo too."""
    hierarchy = make_hierarchy(shape)
    comm = NcclShardedHierarchy(NcclComm(hierarchy.inside), NcclComm(hierarchy.across))
    payload = make_payload(world_size, name="over")
    for accumulate in (False, True):
        shard = torch.full((payload.slice_numel,), 1.0)
        reduced(comm, payload, values(payload, 10 + rank), shard, accumulate=accumulate)
        torch.testing.assert_close(shard, accumulate + average(payload, shape, comm.rank, 10))
    expected = values(payload, 3)
    shard, full = expected.split(payload.slice_numel)[comm.rank].clone(), poisoned(payload.numel, payload.dtype)
    secondary = poisoned(stage_inside(payload, shape[0]).slice_numel, payload.dtype)
    for bound in (
        comm.bind_gather_keeping(payload, shard, full, secondary),
        comm.bind_gather_inside(payload, secondary, full),
    ):
        start_all([bound])
        wait_for_all([bound])
        assert torch.equal(full, expected)
        full.zero_()


def train_as_replicas(rank: int, world_size: int, shape: Shape) -> None:
    """Full weights, losses and outputs are those of the same mesh whose nodes are replicas, bit for bit."""
    trained: list[list[Tensor]] = []
    for across in ("replicate", "shard"):
        torch.manual_seed(rank)
        model = replicated.CASES["gpt"].build()
        passes = default_passes(bucket_bytes=8192)
        zero = fxzero.compile(model, mesh=init_device_mesh("cpu", shape), across=across, passes=passes)
        optimizer = torch.optim.AdamW(zero.parameters(), lr=1e-2)
        seen: list[Tensor] = []
        for step in range(2):
            for micro in range(2):
                torch.manual_seed(step)
                loss = zero(**replicated.CASES["gpt"].batch(100 * step + 10 * micro + rank, 12)).loss
                loss.backward()
                seen.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        trained.append([*seen, *zero.state_dict().values()])
        if across == "shard":
            assert all(param.numel() <= -(-full.numel() // 2) for param, full in zip_params(zero))
    assert all(map(torch.equal, *trained))


def zip_params(zero: fxzero.ZeroModule) -> list[tuple[Tensor, Tensor]]:
    """This rank's slice of each large parameter and its full values."""
    full = {name: value.clone() for name, value in zero.iter_full_params() if value is not None}
    return [(param, full[name]) for name, param in zero.named_parameters() if full[name].numel() > 4096]


def sent_by_phase(comm: Any, run: list[Any]) -> list[list[int]]:
    """Bytes sent inside and across by each function."""
    assert isinstance(comm, HierarchicalComm)
    inside, across = comm.inside.group, comm.across.group  # pyright: ignore[reportAttributeAccessIssue]
    counted = CountedGroup(inside), CountedGroup(across)
    comm.inside.group, comm.across.group = counted  # pyright: ignore[reportAttributeAccessIssue]
    sent: list[list[int]] = []
    for each in run:
        before = [group.nbytes for group in counted]
        each()
        sent.append([group.nbytes - old for group, old in zip(counted, before, strict=True)])
    return sent


def count_bytes(rank: int, world_size: int, shape: Shape, options: dict[str, Any]) -> tuple[Any, Any, str]:
    """What a step sends across by phase, twice without new shards and then with; what the schedule says."""
    torch.manual_seed(0)
    case = replicated.CASES["gpt"]
    zero = fxzero.compile(
        case.build(), mesh=init_device_mesh("cpu", shape), across="shard", passes=default_passes(**options)
    )
    optimizer = torch.optim.SGD(zero.parameters(), lr=0.1)
    zero.state_dict()  # values are there
    losses: list[Tensor] = []

    def forward() -> None:
        losses.append(zero(**case.batch(rank, 12)).loss)

    def backward() -> None:
        losses.pop().backward()

    def step() -> None:
        optimizer.step()

    def evaluate() -> None:
        with torch.no_grad():
            forward()

    def change() -> None:
        with torch.no_grad():
            next(zero.parameters()).mul_(1.0)

    sent = sent_by_phase(
        engine_of(zero).sharded.comm,
        [forward, backward, forward, backward, step, forward, backward, evaluate, change, forward],
    )
    totals = zero.schedule.totals
    return sent, totals, str(zero.schedule)


def evaluate_between_forward_and_backward(rank: int, world_size: int, shape: Shape) -> None:
    """Secondary shards outlive whatever runs between a forward and its backward; values that are stale are not used."""
    case = replicated.CASES["net"]
    grads: list[list[Tensor]] = []
    for disturbed in (False, True):
        torch.manual_seed(0)
        zero = fxzero.compile(
            case.build(), mesh=init_device_mesh("cpu", shape), across="shard", passes=default_passes(bucket_bytes=1024)
        )
        zero.eval()
        batch = case.batch(rank, 12)
        loss = replicated._loss(zero(**batch))
        if disturbed:
            with torch.no_grad():
                zero(**case.batch(rank + 50, 16))
            zero.state_dict()
        loss.backward()
        if disturbed:
            with torch.no_grad():
                zero(**batch)
        replicated._loss(zero(**batch)).backward()
        with torch.no_grad():
            for param in zero.parameters():
                param.mul_(0.5)
        replicated._loss(zero(**batch)).backward()
        grads.append([param.grad.clone() for param in zero.parameters() if param.grad is not None])
    assert len(grads[0]) > 0 and all(map(torch.equal, *grads))


def change_weights_between_micro_steps(rank: int, world_size: int, shape: Shape) -> None:
    """A change in place between two micro-steps reaches the second, of all nodes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 1))
    zero = fxzero.compile(
        model, mesh=init_device_mesh("cpu", shape), across="shard", passes=default_passes(bucket_bytes=8192)
    )
    x = torch.ones(2, 64)
    first = zero(x)
    first.sum().backward()
    zero.load_state_dict({name: value * 0 for name, value in zero.state_dict().items()})
    second = zero(x)
    assert first.abs().min() > 0 and second.abs().max() == 0


def train_without(rank: int, world_size: int, shape: Shape, each: list[dict[str, Any]]) -> None:
    """Optimizations that are turned off, one way or several, change no bit."""
    results: list[list[Tensor]] = []
    for options in ({}, *each):
        torch.manual_seed(0)
        case = replicated.CASES["net"]
        zero = fxzero.compile(case.build(), mesh=init_device_mesh("cpu", shape), across="shard", **options)
        optimizer = torch.optim.SGD(zero.parameters(), lr=0.1)
        for seed in range(4):
            replicated._loss(zero(**case.batch(10 * seed + rank, 12))).backward()
            if seed % 2:
                optimizer.step()
                optimizer.zero_grad()
        results.append(list(zero.state_dict().values()))
    for options, weights in zip(each, results[1:], strict=True):
        assert all(map(torch.equal, weights, results[0])), options


def initialise_on_meta(rank: int, world_size: int, shape: Shape) -> list[Tensor]:
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3))
    zero = fxzero.compile(model, mesh=init_device_mesh("cpu", shape), across="shard", device="cpu")
    return list(zero.state_dict().values())


def report_memory(rank: int, world_size: int, shape: Shape) -> tuple[dict[str, Any], int, int, int]:
    """The report's rows; bytes of secondary shards that are there, of all parameters, and of those gathered twice."""
    torch.manual_seed(0)
    case = replicated.CASES["gpt"]
    zero = fxzero.compile(
        case.build(), mesh=init_device_mesh("cpu", shape), across="shard", passes=default_passes(bucket_bytes=8192)
    )
    zero(**case.batch(rank, 12)).loss.backward()
    shards = engine_of(zero).sharded.shards
    assert shards is not None
    twice = sum(zero.schedule.step.bucket(fqns).gathered.nbytes for fqns in zero.schedule.step.secondaries())
    with torch.no_grad():
        zero(**case.batch(rank, 12))  # a plan that needs none of them
    rows = dict(zero.schedule.memory.rows())
    return rows, shards.secondaries.nbytes, sum(bucket.gathered.nbytes for bucket in shards.layout.buckets), twice


def train_nodes_of_one(rank: int, world_size: int, shape: Shape) -> str:
    zero = fxzero.compile(Net(), mesh=init_device_mesh("cpu", shape), across="shard")
    zero(points(rank)).loss.backward()
    return str(zero.schedule).split("  ")[0]


def differ(rank: int, world_size: int) -> str:
    """One node takes the others for replicas."""
    mesh = init_device_mesh("cpu", (2, 2))
    zero = fxzero.compile(nn.Linear(4, 4), mesh=mesh, across="replicate" if rank >= 2 else "shard")
    return error_of(lambda: zero(torch.ones(2, 4)))


def refuse(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    texts: list[str] = []
    for options in ({"mesh": mesh}, {"process_group": dist.group.WORLD}):
        try:
            fxzero.compile(Net(), across="shard", **options)
        except ValueError as error:
            texts.append(str(error))
    return texts


def give_states_on_some_ranks(rank: int, world_size: int) -> None:
    """The last rank has no part in the model, nor in what its ranks do to give its weights and optimizer's state."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if rank < 4:
        zero = fxzero.compile(Net(), mesh=mesh, across="shard")
        optimizer = torch.optim.AdamW(zero.parameters())
        zero(points(rank)).loss.backward()
        optimizer.step()
        weights, state = get_state_dict(zero, optimizer)
        full = zero.state_dict()
        for name, _ in zero.named_parameters():
            assert torch.equal(weights[name].full_tensor(), full[name])
        by_name: Any = state["state"]
        assert by_name["head.weight"]["exp_avg"].shape == (5, 8)
    dist.barrier()
