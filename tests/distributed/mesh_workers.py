"""What ranks do in test_mesh_ranks.py: nodes of ranks, each of which shards inside and is a replica of the others."""

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fxzero
from fxzero.comm.groups import Hierarchy, group_of_mesh
from fxzero.comm.make import make_comm
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_replicate import GlooAcross, GlooHierarchy, HierarchicalComm, NcclHierarchy
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Placement
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed import api_workers, replicated
from tests.distributed.error_workers import error_of
from tests.helpers.pairs import Net, points, sgd
from tests.helpers.payloads import make_payload, poisoned, reduced, values

CPU = torch.device("cpu")


def make_hierarchy(shape: tuple[int, int]) -> Hierarchy:
    group = group_of_mesh(init_device_mesh("cpu", shape))
    assert isinstance(group, Hierarchy)
    return group


def average(payload: Payload, shape: tuple[int, int], shard: int, seed: int) -> Tensor:
    """The shard of the mean of all ranks' values: summed in a node, then over nodes, then divided."""
    nodes: list[Tensor] = []
    for node in range(shape[0]):
        parts = [values(payload, seed + shape[1] * node + rank).split(payload.slice_numel) for rank in range(shape[1])]
        nodes.append(functools.reduce(torch.add, [part[shard] for part in parts]))
    return functools.reduce(torch.add, nodes) / (shape[0] * shape[1])


def reduce_over_nodes(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    """Reductions alone, then several in flight, waited for in both orders, then after some were abandoned."""
    comm = make_comm(make_hierarchy(shape), CPU)
    assert isinstance(comm, GlooHierarchy)
    assert (comm.rank, comm.shard_ranks, comm.num_nodes) == (rank % shape[1], shape[1], shape[0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        payload = make_payload(shape[1], dtype, f"alone.{dtype}")
        for accumulate in (False, True):
            shard = torch.ones(payload.slice_numel, dtype=dtype) if accumulate else poisoned(payload.slice_numel, dtype)
            mean = average(payload, shape, comm.rank, 10)
            reduced(comm, payload, values(payload, 10 + rank), shard, accumulate=accumulate)
            assert torch.equal(shard, 1 + mean if accumulate else mean)
    payload = make_payload(shape[1], torch.float16, "halves")
    shard = torch.empty(payload.slice_numel, dtype=torch.float16)
    reduced(comm, payload, torch.full((payload.numel,), 40_000.0, dtype=torch.float16), shard, accumulate=False)
    assert torch.all((shard - 40_000.0).abs() <= 32.0)  # one unit in the last place
    payloads = [make_payload(shape[1], name=f"layers.{index}", numel=9_000 * index + 5) for index in range(5)]
    fulls = [torch.empty(payload.numel) for payload in payloads]
    shards = [torch.empty(payload.slice_numel) for payload in payloads]
    bound: list[Any] = []
    for payload, full, shard in zip(payloads, fulls, shards, strict=True):
        scratch = torch.empty(comm.reduce_scratch_numel(payload, accumulate=False))
        bound.append(comm.bind_reduce(payload, full, scratch, shard, accumulate=False))
    for step, order in enumerate([1, -1, 0, 1]):
        for index, (payload, full) in enumerate(zip(payloads, fulls, strict=True)):
            full.copy_(values(payload, 100 * step + index + rank))
        for start, _ in bound:
            start()
        if order == 0:
            bound[0].wait()
            comm.abandon()
            continue
        for _, wait in bound[::order]:
            wait()
        comm.drain()
        for index, (payload, shard) in enumerate(zip(payloads, shards, strict=True)):
            assert torch.equal(shard, average(payload, shape, comm.rank, 100 * step + index)), (step, index)


def reduce_in_parts(rank: int, world_size: int) -> None:
    """The stages across nodes alone, in place and into the landing memory, for shards of odd and tiny sizes."""
    group = dist.group.WORLD
    assert group is not None
    comm = GlooAcross(group)
    for numel in (1, 2, world_size, 10, 64, 1000):
        payload = make_payload(1, name=f"size.{numel}")
        terms = [torch.randn(numel, generator=torch.Generator().manual_seed(peer)) for peer in range(world_size)]
        expected = functools.reduce(torch.add, terms) / 5
        for in_place in (True, False):
            source, landing = terms[rank].clone(), poisoned(numel, torch.float32)
            result = source if in_place else landing
            for start, end in comm.bind_all_reduce(payload, source, landing, result, 5):
                start()
                end()
            assert torch.equal(result, expected), (numel, in_place)
        comm.drain()


def move_from_rank_0(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    comm = make_comm(make_hierarchy(shape), CPU)
    assert comm.is_rank0 == (rank == 0)
    payload = make_payload(shape[1])
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
    assert total == shape[1] - 1


def nccl_code_on_gloo(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    """The calls that NcclHierarchy makes exist in gloo too."""
    hierarchy = make_hierarchy(shape)
    within: Any = NcclComm(hierarchy.inside) if shape[1] > 1 else make_comm(hierarchy.inside, CPU)
    comm = NcclHierarchy(within, NcclComm(hierarchy.across))
    for accumulate in (False, True):
        payload = make_payload(shape[1], name=f"over.{accumulate}")
        shard = torch.full((payload.slice_numel,), 1.0)
        reduced(comm, payload, values(payload, 10 + rank), shard, accumulate=accumulate)
        torch.testing.assert_close(shard, accumulate + average(payload, shape, comm.rank, 10))


def on_mesh(
    rank: int, world_size: int, shape: tuple[int, int], name: str, *args: Any, across: Placement = "replicate"
) -> Any:
    """A worker of api_workers whose modules are compiled on a mesh."""
    compile_, before = fxzero.compile, api_workers.Pair.ranks_per_node
    fxzero.compile = functools.partial(compile_, mesh=init_device_mesh("cpu", shape), across=across)
    api_workers.Pair.ranks_per_node = shape[1]
    try:
        return getattr(api_workers, name)(rank, world_size, *args)
    finally:
        fxzero.compile, api_workers.Pair.ranks_per_node = compile_, before


def replicas(rank: int, world_size: int, shape: tuple[int, int]) -> list[list[Tensor]]:
    """Train, clipped by the norm of all, on different data: shards, gradients, optimizer state, and full weights."""
    torch.manual_seed(rank)
    case = replicated.CASES["gpt"]
    model = case.build()
    zero = fxzero.compile(model, mesh=init_device_mesh("cpu", shape), passes=default_passes(bucket_bytes=8192))
    optimizer = torch.optim.AdamW(zero.parameters(), lr=1e-2)
    norms: list[Tensor] = []
    for step in range(5):
        optimizer.zero_grad()
        zero(**case.batch(100 * step + rank, 16)).loss.backward()
        norms.append(zero.clip_grad_norm_(0.5))
        optimizer.step()
    params = list(zero.parameters())
    state = [optimizer.state[param][name] for param in params for name in ("exp_avg", "exp_avg_sq")]
    full = list(zero.state_dict().values())
    zero.eval()
    with torch.no_grad():
        loss = zero(**case.batch(7, 16)).loss
    grads = [param.grad for param in params if param.grad is not None]
    return [[*[param.detach() for param in params], *grads, *state], [*full, loss, *norms]]


class CountedGroup:
    """A process group of which the bytes that are sent are counted."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.nbytes = 0

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        self.nbytes += sum(tensor.nbytes for tensor in tensors)
        return self._group.send(tensors, peer, tag)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


def count_bytes(rank: int, world_size: int, shape: tuple[int, int]) -> tuple[list[int], list[int], str]:
    """Bytes of a step, sent inside and across, and what the schedule says of them."""
    zero = fxzero.compile(Net(), mesh=init_device_mesh("cpu", shape))
    comm: Any = engine_of(zero).sharded.comm
    assert isinstance(comm, HierarchicalComm)
    zero.state_dict()  # values are there
    inside, across = CountedGroup(getattr(comm.inside, "group", None)), CountedGroup(comm.across.group)
    comm.inside.group, comm.across.group = inside, across  # pyright: ignore[reportAttributeAccessIssue]
    zero(points()).loss.backward()
    totals = zero.schedule.totals
    planned = [totals.gathered_bytes + totals.reduced_bytes - totals.across_bytes, totals.across_bytes]
    return [inside.nbytes, across.nbytes], planned, str(zero.schedule).splitlines()[0]


def initialise_on_meta(rank: int, world_size: int) -> list[Tensor]:
    """Weights of a meta model, as every rank gets them."""
    torch.manual_seed(rank)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 3))
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    zero = fxzero.compile(model, mesh=mesh, device="cpu")
    return list(zero.state_dict().values())


def train_in_part_of_the_ranks(rank: int, world_size: int) -> str:
    """A mesh of two of three ranks, each a node; the third is no member."""
    mesh = DeviceMesh("cpu", [[2], [0]])
    torch.manual_seed(rank)
    if rank == 1:
        return error_of(lambda: fxzero.compile(Net(), mesh=mesh))
    zero = fxzero.compile(Net(), mesh=mesh)
    optimizer = sgd(zero)
    zero(points(rank)).loss.backward()
    optimizer.step()
    assert zero.clip_grad_norm_(1.0).isfinite()
    return str([value.double().sum().item() for value in zero.state_dict().values()])


def use_part_of_a_larger_mesh(rank: int, world_size: int) -> str:
    """The last two dimensions of three, and the last alone."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("pipeline", "replicate", "shard"))
    headers: list[str] = []
    for part in (mesh["replicate", "shard"], mesh["shard"]):
        zero = fxzero.compile(Net(), mesh=part)
        zero(points()).loss.backward()
        headers.append(str(zero.schedule).split("  ")[0])
    try:
        fxzero.compile(Net(), mesh=mesh)
    except ValueError as error:
        headers.append(str(error))
    return "; ".join(headers)


def refuse(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 1))
    try:
        fxzero.compile(Net(), mesh=mesh, process_group=dist.group.WORLD)
    except ValueError as error:
        first = str(error)
    else:
        first = "nothing"
    elsewhere = DeviceMesh("cuda", [[0], [1]], _init_backend=False)
    elsewhere.get_group = mesh.get_group  # type: ignore[method-assign]
    return [first, error_of(lambda: fxzero.compile(Net(), mesh=elsewhere))]


def differ_between_nodes(rank: int, world_size: int, how: str) -> str:
    """Node 1 compiles another model, or sees a mesh of another shape."""
    model = nn.Linear(4, 5 if how == "model" and rank >= 2 else 4)
    groups = [init_device_mesh("cpu", shape) for shape in ((2, 2), (4, 1))]
    mesh = groups[how == "mesh" and rank >= 2]
    zero = fxzero.compile(model, mesh=mesh, timeout=timedelta(seconds=20))
    return error_of(lambda: zero(torch.ones(2, 4)))
